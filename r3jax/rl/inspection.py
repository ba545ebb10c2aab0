"""Stages whose updates also count what is not finite: in scored samples and in gradients."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from r3jax import types
from r3jax.agent import rollout_settings
from r3jax.rl import diagnostics
from r3jax.rl import group_table
from r3jax.rl import losses
from r3jax.rl import nonfinite
from r3jax.rl import replica_stages
from r3jax.rl import train_state
from r3jax.rl import update

# Name of the metric of every stage that holds an `UpdateCounts`.
COUNTS = "nonfinite"


@dataclasses.dataclass(frozen=True)
class InspectedStages(replica_stages.ReplicaStages):
  """The same stages; the metrics of an update also hold what is not finite in it.

  The metric `COUNTS` is {"scored", "gradients"}: `nonfinite.RowCounts` of what the policy and the
  reference give all samples, and the number of every gradient, a tree like the trained parameters.
  """

  def _gradient(
    self,
    state: train_state.TrainState,
    frozen: train_state.Frozen,
    forward: update.Forward,
    batch: update.Batch,
    flow: rollout_settings.FlowSettings,
    table: group_table.GroupTable,
  ) -> tuple[update.LossGradient, diagnostics.Metrics]:
    gradient, metrics = super()._gradient(
      state, frozen, forward, batch, flow, table
    )
    scored = self._scored(state.policy, forward, batch, "policy")
    if self.settings.loss.needs_reference and frozen.reference is not None:
      scored |= self._scored(frozen.reference, forward, batch, "reference")
    counts = {
      "scored": scored,
      "gradients": jax.tree.map(nonfinite.count, gradient.gradients),
    }
    inspected: dict[str, Any] = {**metrics, COUNTS: counts}
    return gradient, inspected

  def _scored(
    self,
    policy: types.Params,
    forward: update.Forward,
    batch: update.Batch,
    name: str,
  ) -> nonfinite.RowCounts:
    """Counts in what a policy gives all samples of the stage, [B] over all replicas."""
    rows = jnp.arange(self.place.num_rows)
    shared, (recorded, rows) = self.place.micro_batches(
      batch.shared, (batch.recorded, rows), self.settings.num_micro_batches
    )

    def count(micro_batch) -> nonfinite.RowCounts:
      shared, recorded = micro_batch
      outputs = forward(policy, shared, recorded)
      text = recorded.text
      # Slots behind a text carry no loss.
      mask = losses.token_mask(text.lengths, text.ids.shape[1])
      logprob = jnp.where(mask, outputs.logprob, 0.0)
      return {
        f"log-probs of the {name}": nonfinite.per_row(logprob),
        f"velocity of the {name}": nonfinite.per_row(outputs.velocity),
      }

    counts = jax.lax.map(count, (shared, recorded))

    def in_order(x: jax.Array) -> jax.Array:
      # Micro-batches hold the rows in another order.
      flat = x.reshape(-1)
      return jnp.zeros_like(flat).at[rows.reshape(-1)].set(flat)

    return self.place.gather(jax.tree.map(in_order, counts))

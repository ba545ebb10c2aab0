"""The gradient of one update, over micro-batches if need be (R3.md section 8)."""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from r3jax import types
from r3jax.agent import experience
from r3jax.agent import rollout_settings
from r3jax.rl import iteration_settings
from r3jax.rl import objective
from r3jax.sampling import flow_matching


@flax.struct.dataclass
class Recorded:
  """What a stage sampled and what it earned, [B, ...]."""

  text: experience.Text
  flow: flow_matching.Trajectory
  # what images were drawn after, in the refine stage
  told: experience.Instruction | None
  text_advantage: jax.Array
  image_advantage: jax.Array
  valid: jax.Array  # samples that count


# log-probs [B, T - 1], velocities [B, N, C]
Outputs = tuple[jax.Array, types.Latent]
# policy, rows of groups, rows of samples
Forward = Callable[[types.Params, object, Recorded], Outputs]


@flax.struct.dataclass
class Found:
  """The loss of some samples, its terms, and its gradient; all but the mismatches are sums."""

  value: jax.Array
  text: objective.TextTerms
  images: objective.FlowTerms
  gradients: types.Params


def gradients(
  policy: types.Params,
  reference: types.Params | None,
  forward: Forward,
  batch,
  totals: tuple[jax.Array, jax.Array],
  flow: rollout_settings.FlowSettings,
  loss: iteration_settings.LossSettings,
) -> Found:
  """Returns this replica's share of the loss and its gradient.

  Args:
    policy: to differentiate by.
    reference: that the KL is taken to; None where there is none.
    forward: scores recorded samples.
    batch: (rows of groups, rows of samples) with a leading axis of micro-batches.
    totals: tokens and images that count, over all replicas.
    flow: of the stage's images.
    loss: weights.
  """

  def objective_of(policy, anchor, groups, recorded: Recorded):
    outputs = forward(policy, groups, recorded)
    anchor = jax.lax.stop_gradient(outputs) if anchor is None else anchor
    text = objective.text_terms(
      outputs[0],
      anchor[0],
      recorded.text,
      recorded.text_advantage,
      recorded.valid,
      loss.clip_range,
    )
    images = objective.flow_terms(
      outputs[1],
      anchor[1],
      recorded.flow,
      flow,
      recorded.image_advantage,
      recorded.valid,
      loss.clip_range,
    )
    return objective.total(text, images, *totals, loss), (text, images)

  def of_part(part) -> Found:
    anchor = None if reference is None else forward(reference, *part)
    (value, (text, images)), found = jax.value_and_grad(
      objective_of, has_aux=True
    )(policy, anchor, *part)
    return Found(value, text, images, found)

  parts = jax.tree.leaves(batch)[0].shape[0]
  if parts == 1:
    return of_part(jax.tree.map(lambda x: x[0], batch))
  first = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype),
    jax.eval_shape(of_part, jax.tree.map(lambda x: x[0], batch)),
  )
  return jax.lax.scan(
    lambda found, part: (_added(found, of_part(part)), None), first, batch
  )[0]


def _added(one: Found, other: Found) -> Found:
  found = jax.tree.map(jnp.add, one, other)
  worst = lambda name: jnp.maximum(
    getattr(one, name).mismatch, getattr(other, name).mismatch
  )
  return found.replace(
    text=found.text.replace(mismatch=worst("text")),
    images=found.images.replace(mismatch=worst("images")),
  )

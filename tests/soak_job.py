"""The main job with numbers that break at fixed iterations, for `tests/soak.py`.

  python -m tests.soak_job FLAGS OF r3jax train

Every POISON_PERIOD iterations the log-probs of the sampled thoughts become NaN, and half a period
later those of the reflections infinite. A run that was interrupted and one that was not meet the
same faults at the same iterations.
"""

import dataclasses
import sys

import jax.numpy as jnp

from r3jax.cli import main
from r3jax.rl import replica_stages

POISON_PERIOD = 60
_NAN_AT = 20
_INFINITE_AT = 50


def _poisoned(samples, step, at: int, value: float):
  """Returns samples whose text has broken log-probs in the iterations that are `at` in a period."""
  is_due = step % POISON_PERIOD == at
  text = samples.text
  # A factor of 1 leaves every other iteration exactly as it is.
  factor = jnp.where(is_due, value, 1.0)
  broken = dataclasses.replace(
    text, behavior_logprob=text.behavior_logprob * factor
  )
  return dataclasses.replace(samples, text=broken)


def plant() -> None:
  """Makes the updates of every later run read broken samples now and then."""
  stages = replica_stages.ReplicaStages
  learn_to_reason = stages.learn_to_reason
  learn_to_edit = stages.learn_to_edit

  def reason(self, state, frozen, drafts, score):
    rollout = _poisoned(drafts.rollout, state.step, _NAN_AT, jnp.nan)
    drafts = dataclasses.replace(drafts, rollout=rollout)
    return learn_to_reason(self, state, frozen, drafts, score)

  def edit(self, state, frozen, edits, score):
    edits = _poisoned(edits, state.step, _INFINITE_AT, jnp.inf)
    return learn_to_edit(self, state, frozen, edits, score)

  stages.learn_to_reason = reason
  stages.learn_to_edit = edit


if __name__ == "__main__":
  plant()
  main.run_command("train", sys.argv[1:])

"""Tests of run/logging/host_metrics.py."""

import types

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from r3jax import types as types_lib
from r3jax.model import parameters
from r3jax.rl import stage_outputs
from r3jax.rl import train_state
from r3jax.run.logging import host_metrics

OPTIMIZER = train_state.OptimizerSettings(
  1e-3, 4e-3, 10, 0.9, 0.95, 1e-8, 0.0, 1.0, False
)
POLICY = {"layers": {"und": jnp.ones(1), "gen": jnp.ones(1)}}
RECORDS = [
  types.SimpleNamespace(tag=tag) for tag in ("counting", "colors", "position")
]


def _score(value, valid) -> types_lib.Score:
  return types_lib.Score(np.array(value, np.float32), np.array(valid), {})


def _experiment(**changes) -> types.SimpleNamespace:
  settings = types.SimpleNamespace(
    group_size=2, num_reflect_rounds=changes.pop("reflect_rounds", 1)
  )
  optimizer = train_state.OptimizerSettings(**vars(OPTIMIZER) | changes)
  return types.SimpleNamespace(
    train=RECORDS, settings=settings, optimizer=optimizer
  )


def _state(experiment, updates: int) -> train_state.TrainState:
  policy = POLICY
  if experiment.optimizer.freeze_und:
    _, policy = parameters.split_experts(POLICY)
  opt_state = train_state.make_optimizer(experiment.optimizer).init(policy)
  return train_state.TrainState(
    policy, optax.tree.set(opt_state, count=jnp.int32(updates)), jnp.int32(0)
  )


DRAFTS = _score([0.5, 1.0, 0.25, np.nan], [True, True, True, False])
ROWS = np.array([2, 0])  # position, counting


class TestMetrics:
  def test_edits_have_the_tag_of_the_image_that_was_drawn(self):
    edits = types.SimpleNamespace(
      prompt_index=np.array([0, 0, 0, 1]),
      valid_before=np.array([True, True, False, True]),
    )
    samples = stage_outputs.Samples(
      None,
      DRAFTS,
      edits,
      _score([0.0, 1.0, 0.75, np.nan], [True, True, True, False]),
    )
    experiment = _experiment()
    found = host_metrics.compute(
      experiment, _state(experiment, 4), ROWS, samples
    )
    assert found == pytest.approx(
      {
        "reason/tag/position": 0.75,
        "reason/tag/counting": 0.25,
        "edit/tag/position": 0.5,
        "optimizer/updates": 4.0,
        "optimizer/learning_rate_und": 3e-4,
        "optimizer/learning_rate_gen": 1.2e-3,
      }
    )

  def test_names_the_last_round(self):
    edits = types.SimpleNamespace(
      prompt_index=np.zeros(4, int), valid_before=np.ones(4, bool)
    )
    experiment = _experiment(reflect_rounds=2)
    samples = stage_outputs.Samples(
      None, DRAFTS, edits, _score([1.0] * 4, [True] * 4)
    )
    found = host_metrics.compute(
      experiment, _state(experiment, 3), ROWS, samples
    )
    assert found["edit2/tag/position"] == 1 and "edit/tag/position" not in found

  def test_reason_alone_with_und_frozen_before_any_update(self):
    experiment = _experiment(
      freeze_und=True, reflect_rounds=0, warmup_updates=0
    )
    found = host_metrics.compute(
      experiment,
      _state(experiment, 0),
      ROWS,
      stage_outputs.Samples(None, DRAFTS, None, None),
    )
    assert found == pytest.approx(
      {
        "reason/tag/position": 0.75,
        "reason/tag/counting": 0.25,
        "optimizer/updates": 0.0,
        "optimizer/learning_rate_und": 0.0,
        "optimizer/learning_rate_gen": 4e-3,
      }
    )

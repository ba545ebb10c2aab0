"""Tests of the update that is skipped because a number is not finite; also in test_iteration.py."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r3jax import types
from r3jax.rl import diagnostics
from r3jax.rl import objective
from r3jax.rl import placement
from r3jax.rl import replica_stages
from r3jax.rl import train_state
from r3jax.rl import update
from tests.rl import test_optimizer

POLICY = test_optimizer.POLICY
# Weight decay would move the policy with no gradient at all.
OPTIMIZER = train_state.make_optimizer(
  dataclasses.replace(
    test_optimizer.SETTINGS, warmup_updates=0, weight_decay=0.1
  )
)


def _stages(num_replicas: int) -> replica_stages.ReplicaStages:
  """Returns stages without a model, which can take an optimizer step."""
  stages = object.__new__(replica_stages.ReplicaStages)
  object.__setattr__(stages, "optimizer", OPTIMIZER)
  object.__setattr__(stages, "num_replicas", num_replicas)
  return stages


def _share(loss: jax.Array, gradient: jax.Array) -> update.Gradients:
  """Returns a replica's share with a loss and a gradient, all of whose terms are 1."""
  ones = jnp.ones(())
  text = objective.TextTerms(*[ones] * 8)
  image = objective.FlowTerms(*[ones] * 7)
  gradients = jax.tree.map(lambda x: gradient * jnp.ones_like(x), POLICY)
  return update.Gradients(loss, text, image, gradients)


def _stepped(values: np.ndarray, quantity: str):
  """Returns the state after an update of one replica for each value, and whether it is skipped.

  Args:
    values: what `quantity` is on each replica.
    quantity: "loss", "gradient" or "ratio".
  """
  num_replicas = len(values)
  stages = _stages(num_replicas)

  def step(state: train_state.TrainState, values: jax.Array):
    value = values[0]
    share = _share(jnp.ones(()), jnp.ones(()))
    if quantity == "loss":
      share = _share(value, jnp.ones(()))
    elif quantity == "gradient":
      share = _share(jnp.ones(()), value)
    else:
      text = dataclasses.replace(share.text, ratio=value)
      share = dataclasses.replace(share, text=text)
    whole = update.over_replicas(share)
    metrics = {"loss": whole.loss} | diagnostics.update(
      whole.text, whole.image, whole.gradients
    )
    num_nonfinite = diagnostics.num_nonfinite(metrics)
    gradient = update.LossGradient(
      whole.loss, whole.gradients, jnp.int32(1), num_nonfinite
    )
    skipped = diagnostics.skipped(num_nonfinite)
    new_state = stages._step(state, gradient)
    # A row for each replica, to compare them.
    return jax.tree.map(lambda x: x[None], (new_state, skipped))

  mesh = jax.sharding.Mesh(
    np.array(jax.devices()[:num_replicas]), (placement.AXIS,)
  )
  rows = jax.sharding.PartitionSpec(placement.AXIS)
  mapped = jax.shard_map(
    step,
    mesh=mesh,
    in_specs=(jax.sharding.PartitionSpec(), rows),
    out_specs=rows,
    check_vma=False,
  )
  return jax.device_get(jax.jit(mapped)(_state(), np.float32(values)))


@functools.cache
def _state() -> train_state.TrainState:
  """Returns a state whose moments are not 0."""
  opt_state = OPTIMIZER.init(POLICY)
  _, opt_state = OPTIMIZER.update(test_optimizer.GRADIENT, opt_state, POLICY)
  return train_state.TrainState(POLICY, opt_state, jnp.int32(1))


def _assert_unchanged(rows: train_state.TrainState):
  """Asserts that the state of every replica is the one before the update."""

  def check(path, new, old):
    for row in new:
      np.testing.assert_array_equal(row, old, jax.tree_util.keystr(path))

  jax.tree_util.tree_map_with_path(check, rows, _state())


class TestStep:
  @pytest.mark.parametrize("quantity", ["loss", "gradient", "ratio"])
  @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
  def test_is_skipped_on_both_of_two_replicas(self, quantity, value):
    """One inf on one device made policy and moments NaN on all."""
    state, skipped = _stepped(np.array([1.0, value]), quantity)
    np.testing.assert_array_equal(skipped, [1, 1])
    _assert_unchanged(state)

  def test_is_skipped_where_the_norm_overflows(self):
    """Clipping by an infinite norm would leave a step of decay and momentum alone."""
    state, skipped = _stepped(np.array([1e30]), "gradient")
    np.testing.assert_array_equal(skipped, [1])
    _assert_unchanged(state)

  def test_is_made_where_all_is_finite(self):
    state, skipped = _stepped(np.array([1.0, 2.0]), "gradient")
    np.testing.assert_array_equal(skipped, [0, 0])
    for new, old in zip(
      jax.tree.leaves(state.policy), jax.tree.leaves(POLICY), strict=True
    ):
      assert (new[0] != old).all()
      np.testing.assert_array_equal(new[0], new[1])
    np.testing.assert_array_equal(
      train_state.updates_done(state.opt_state), [2, 2]
    )


class TestScore:
  def test_is_missing_where_it_is_not_finite_or_cannot_be(self):
    value = jnp.array([0.5, np.nan, np.inf, -np.inf, 0.0, 1.0])
    valid = jnp.array([True, True, True, True, True, False])
    flags = jnp.array([True, True, True, True, False, True])
    score = types.Score(value, valid, {}).only_where(flags)
    np.testing.assert_array_equal(score.valid, [True] + [False] * 5)

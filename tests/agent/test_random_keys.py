"""Tests of the random keys: training's as they always were, evaluation's apart from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r3jax.agent import random_keys
from r3jax.rl import placement

SEED = 3
COUNT = 4  # of iterations, stages, prompts, images, rounds, groups, samples


def _words(keys) -> set[tuple[int, int]]:
  """Returns the two words of every key."""
  data = np.asarray(jax.random.key_data(keys)).reshape(-1, 2)
  return {tuple(pair) for pair in data.tolist()}


def _with_children(keys: random_keys.Keys) -> set[tuple[int, int]]:
  """Returns the keys of a stage, and those that its text and its flow split off."""
  text, flow = random_keys.split_keys(keys)
  words = set()
  for part in (keys, text, flow):
    words |= _words(part.group) | _words(part.sample)
  return words


def _training_keys() -> set[tuple[int, int]]:
  """Returns the keys of a few iterations, stage by stage, on one replica."""
  place = placement.Placement(COUNT, COUNT, 1)
  words = set()
  for step in range(COUNT):
    key = random_keys.iteration_key(SEED, step)
    for stage in placement.STAGES:
      for turn in range(2):

        def keys_on_replica(_, key=key, stage=stage, turn=turn):
          return place.keys(key, stage, turn)

        replicas = jax.vmap(keys_on_replica, axis_name=placement.AXIS)
        keys = replicas(jnp.zeros(1))
        words |= _with_children(jax.tree.map(lambda x: x[0], keys))
  return words


def _evaluation_keys() -> set[tuple[int, int]]:
  """Returns the keys of a few prompts, images and rounds."""
  grid = np.stack(np.meshgrid(*[np.arange(COUNT)] * 3), axis=-1)
  ids = jnp.asarray(grid.reshape(-1, 3), jnp.int32)
  return _with_children(random_keys.evaluation_keys(SEED, ids))


class TestDomains:
  def test_equal_seeds_share_no_key(self):
    """Before there were domains, an evaluation with the seed of training drew some of its noise."""
    training = _training_keys()
    evaluation = _evaluation_keys()
    assert len(evaluation) == 6 * COUNT**3
    assert not training & evaluation

  @pytest.mark.parametrize("step", [0, 1, 2**31 - 1])
  def test_training_folds_its_iteration_into_its_seed(self, step):
    expected = jax.random.fold_in(jax.random.key(SEED), step)
    actual = random_keys.iteration_key(jnp.uint32(SEED), jnp.int32(step))
    assert _words(actual) == _words(expected)

  def test_no_iteration_has_the_key_of_evaluation(self):
    # A row without numbers is the key of the domain itself, split in two.
    keys = random_keys.evaluation_keys(SEED, jnp.zeros((1, 0), jnp.int32))
    expected = jax.random.split(
      jax.random.fold_in(jax.random.key(SEED), np.uint32(2**31))
    )
    assert _words(keys.group) | _words(keys.sample) == _words(expected)
    assert np.iinfo(np.int32).max < random_keys._EVALUATION


class TestEvaluationKeys:
  def test_rows_depend_on_their_numbers_alone(self):
    ids = jnp.array([[0, 1, 2], [5, 1, 0], [0, 1, 2]], jnp.int32)
    keys = random_keys.evaluation_keys(SEED, ids)
    single = random_keys.evaluation_keys(SEED, ids[1:2])
    assert _words(keys.group[0]) == _words(keys.group[2])
    assert _words(keys.sample[1]) == _words(single.sample[0])
    assert len(_words(keys.group) | _words(keys.sample)) == 4

  def test_seeds_share_no_key(self):
    ids = jnp.array([[0, 0, 0]], jnp.int32)
    first = _with_children(random_keys.evaluation_keys(0, ids))
    second = _with_children(random_keys.evaluation_keys(1, ids))
    assert not first & second

"""Tests of data/pipeline.py."""

import json

import numpy as np
import pytest

from r3jax.data import pipeline


def take(iterator, steps):
  return np.stack([next(iterator) for _ in range(steps)])


class TestPromptIterator:
  def test_epoch_holds_every_record_once(self):
    indices = take(
      pipeline.prompt_iterator(num_prompts=10, groups_per_step=4, seed=0), 15
    )
    assert indices.shape == (15, 4) and indices.dtype == np.int32
    for epoch in indices.reshape(6, 10):
      assert sorted(epoch) == list(range(10))

  def test_single_prompt_per_step_is_drawn(self):
    iterator = pipeline.prompt_iterator(3, 1, seed=0)
    drawn = [next(iterator) for _ in range(6)]
    assert all(rows.shape == (1,) for rows in drawn)
    assert sorted(int(rows[0]) for rows in drawn[:3]) == [0, 1, 2]

  def test_epochs_are_shuffled_differently(self):
    epochs = take(
      pipeline.prompt_iterator(num_prompts=20, groups_per_step=20, seed=0), 3
    )
    assert len({tuple(epoch) for epoch in epochs} | {tuple(range(20))}) == 4

  def test_order_depends_on_the_seed_alone(self):
    first, again, other = (
      take(pipeline.prompt_iterator(30, 4, seed), 8) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()

  def test_order_does_not_depend_on_the_groups_per_step(self):
    np.testing.assert_array_equal(
      take(pipeline.prompt_iterator(12, 2, seed=5), 9).ravel(),
      take(pipeline.prompt_iterator(12, 6, seed=5), 3).ravel(),
    )

  def test_more_groups_than_records_repeats_records(self):
    indices = next(
      pipeline.prompt_iterator(num_prompts=3, groups_per_step=7, seed=0)
    )
    assert sorted(indices[:3]) == sorted(indices[3:6]) == [0, 1, 2]

  @pytest.mark.parametrize("done", [0, 1, 7])
  def test_resumed_equals_uninterrupted(self, done):
    iterator = pipeline.prompt_iterator(
      num_prompts=10, groups_per_step=3, seed=4
    )
    take(iterator, done) if done else None
    state = json.loads(json.dumps(iterator.get_state()))
    resumed = pipeline.prompt_iterator(
      num_prompts=10, groups_per_step=3, seed=4
    )
    resumed.set_state(state)
    np.testing.assert_array_equal(take(resumed, 9), take(iterator, 9))

  @pytest.mark.parametrize("sizes", [(0, 4), (10, 0)])
  def test_empty_sizes_are_refused(self, sizes):
    with pytest.raises(ValueError, match="must be at least 1"):
      pipeline.prompt_iterator(*sizes, seed=0)

"""Tests of returns and advantages."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r3jax.rl import returns
from tests.rl import tables


def _advantage(values, valid=None, divide_by_std=False) -> np.ndarray:
  """Returns the advantages of one group."""
  values = jnp.asarray(values, jnp.float32)[None]
  valid = (
    jnp.ones(values.shape, bool) if valid is None else jnp.asarray(valid)[None]
  )
  return np.asarray(returns.group_advantage(values, valid, divide_by_std)[0])


class TestImprovement:
  def test_is_1_for_stopping_at_a_perfect_image_only(self):
    score, before = (
      jnp.array([1.0, 0.4, 0.4, 1.0]),
      jnp.array([1.0, 1.0, 0.5, 1.0]),
    )
    stop = jnp.array([True, True, True, False])
    np.testing.assert_allclose(
      returns.improvement(score, before, stop), [1, 1, -0.1, 0], atol=1e-6
    )


class TestGroupAdvantage:
  def test_leaves_the_invalid_out(self):
    found = _advantage([1.0, np.nan, 3.0, 8.0], [True, False, True, False])
    np.testing.assert_array_equal(found, [-1, 0, 1, 0])

  def test_divides_by_the_deviation_of_the_valid(self):
    found = _advantage([1.0, 9.0, 3.0], [True, False, True], divide_by_std=True)
    np.testing.assert_allclose(found, [-(0.5**0.5), 0, 0.5**0.5], rtol=1e-5)

  @pytest.mark.parametrize("divide_by_std", [False, True])
  def test_is_zero_with_one_valid_sample(self, divide_by_std):
    found = _advantage([5.0, 1.0], [True, False], divide_by_std)
    np.testing.assert_array_equal(found, [0, 0])

  def test_is_zero_where_all_are_equal(self):
    np.testing.assert_array_equal(
      _advantage([0.5, 0.5, 0.5], divide_by_std=True), [0, 0, 0]
    )

  @pytest.mark.parametrize("divide_by_std", [False, True])
  @pytest.mark.parametrize("num_valid", [7, 12, 15, 24])
  def test_is_exactly_zero_for_every_equal_return(
    self, num_valid, divide_by_std
  ):
    """The rounding of the mean, divided by a deviation of the same size, gave up to 0.106."""
    returns_of_groups = np.arange(-1, 2.0001, 0.001, np.float32)
    values = np.full((returns_of_groups.size, 24), np.nan, np.float32)
    values[:, :num_valid] = returns_of_groups[:, None]
    valid = np.isfinite(values)
    advantage = returns.group_advantage(values, valid, divide_by_std)
    np.testing.assert_array_equal(advantage, np.zeros_like(values))

  def test_groups_do_not_mix(self):
    values = jnp.array([[0.0, 1.0], [10.0, 30.0]])
    found = jax.jit(returns.group_advantage, static_argnums=2)(
      values, values >= 0, False
    )
    np.testing.assert_array_equal(found, [[-0.5, 0.5], [-10, 10]])


class TestComparable:
  def test_leaves_out_the_only_valid_sample_of_a_group(self):
    valid = jnp.array([[True, True, False], [False, True, False]])
    np.testing.assert_array_equal(
      returns.comparable(valid), [[True, True, False], [False, False, False]]
    )


class TestReasonAdvantages:
  def test_text_earns_for_format_and_image(self):
    # f r + f = 2, 0, 1.5; the second group has one valid reward
    advantages = returns.reason_advantages(tables.reason_table(), tables.LOSS)
    expected = [[5 / 6, -7 / 6, 1 / 3], [0, 0, 0]]
    np.testing.assert_allclose(advantages.text, expected, rtol=1e-5)

  def test_image_earns_its_reward(self):
    advantages = returns.reason_advantages(tables.reason_table(), tables.LOSS)
    np.testing.assert_allclose(
      advantages.image, [[0.5, -0.5, 0], [0, 0, 0]], atol=1e-6
    )
    np.testing.assert_array_equal(advantages.counts, [[True] * 3, [False] * 3])


class TestEditAdvantages:
  def test_text_earns_for_the_improvement(self):
    # d + f = 2, 2, 0.4 (stopping at a perfect image earns 1) and 1.2, 1, 0.7
    advantages = returns.edit_advantages(
      tables.edit_table(), tables.LOSS, own_sources=False
    )
    mean, other_mean = 4.4 / 3, 2.9 / 3
    expected = [
      [2 - mean, 2 - mean, 0.4 - mean],
      [1.2 - other_mean, 1 - other_mean, 0.7 - other_mean],
    ]
    np.testing.assert_allclose(advantages.text, expected, rtol=1e-4)

  def test_image_that_was_not_edited_has_no_advantage(self):
    advantages = returns.edit_advantages(
      tables.edit_table(), tables.LOSS, own_sources=False
    )
    mean = 1.4 / 3
    np.testing.assert_allclose(
      advantages.image,
      [[0, 0, 0.4 - 0.8], [0.7 - mean, 0, 0.2 - mean]],
      rtol=1e-4,
      atol=1e-7,
    )

  def test_own_sources_are_rewarded_for_the_improvement_alone(self):
    # The second group starts from 0.2, 0.9 and 0.5.
    table = dataclasses.replace(
      tables.edit_table(),
      reward_before=jnp.array([[1.0, 1.0, 1.0], [0.2, 0.9, 0.5]]),
    )
    advantages = returns.edit_advantages(table, tables.LOSS, own_sources=True)
    # r - r0 = 0, 0, -0.6 and 0.5, -0.4, -0.3; stopping has no image advantage
    mean = -0.2
    other_mean = -0.2 / 3
    np.testing.assert_allclose(
      advantages.image,
      [[0, 0, -0.6 - mean], [0.5 - other_mean, 0, -0.3 - other_mean]],
      rtol=1e-4,
      atol=1e-7,
    )

  def test_own_sources_that_are_equal_are_shared_sources(self):
    table = tables.edit_table()
    own = returns.edit_advantages(table, tables.LOSS, own_sources=True)
    shared = returns.edit_advantages(table, tables.LOSS, own_sources=False)
    np.testing.assert_allclose(own.image, shared.image, atol=1e-7)
    np.testing.assert_array_equal(own.text, shared.text)

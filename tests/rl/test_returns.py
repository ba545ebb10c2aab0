"""Tests of returns and advantages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r3jax.rl import returns


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

  def test_groups_do_not_mix(self):
    values = jnp.array([[0.0, 1.0], [10.0, 30.0]])
    found = jax.jit(returns.group_advantage, static_argnums=2)(
      values, values >= 0, False
    )
    np.testing.assert_array_equal(found, [[-0.5, 0.5], [-10, 10]])

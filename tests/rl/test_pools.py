"""Tests of the pool: draws against probabilities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r3jax.rl import pools

DRAWS = 100_000


@functools.partial(jax.jit, static_argnums=2)
def _draws(score, valid, perfect):
  keys = jax.random.split(jax.random.key(0), DRAWS)
  return jax.vmap(lambda key: pools.draw(key, score, valid, perfect))(keys)


def _frequencies(score, valid, perfect) -> np.ndarray:
  chosen = _draws(jnp.asarray(score), jnp.asarray(valid), perfect)
  return np.bincount(np.asarray(chosen), minlength=len(score)) / DRAWS


def _assert_near(frequencies, probabilities) -> None:
  """Asserts equality within four standard errors; what cannot happen never does."""
  probabilities = np.asarray(probabilities)
  error = 4 * np.sqrt(probabilities * (1 - probabilities) / DRAWS)
  assert (np.abs(frequencies - probabilities) <= error).all(), (
    frequencies,
    probabilities,
  )


SCORE = np.array([1.0, 0.0, 0.5, 1.0, 0.999, 1.0], np.float32)
ALL = np.ones(len(SCORE), bool)


class TestDraw:
  def test_is_uniform_inside_each_side(self):
    expected = np.where(SCORE == 1, 0.15 / 3, 0.85 / 3)
    _assert_near(_frequencies(SCORE, ALL, 0.15), expected)

  def test_never_draws_the_invalid(self):
    valid = np.array([False, True, False, True, True, True])
    found = _frequencies(SCORE, valid, 0.15)
    _assert_near(found, [0, 0.85 / 2, 0, 0.15 / 2, 0.85 / 2, 0.15 / 2])

  def test_takes_the_rest_where_nothing_is_perfect(self):
    found = _frequencies(SCORE, SCORE != 1, 0.15)
    _assert_near(found, np.where(SCORE != 1, 1 / 3, 0))

  def test_takes_the_perfect_where_nothing_else_is(self):
    found = _frequencies(SCORE, SCORE == 1, 0.15)
    _assert_near(found, np.where(SCORE == 1, 1 / 3, 0))

  @pytest.mark.parametrize(
    "perfect, side", [(0.0, SCORE != 1), (1.0, SCORE == 1)]
  )
  def test_keeps_to_one_side_at_the_ends(self, perfect, side):
    _assert_near(_frequencies(SCORE, ALL, perfect), np.where(side, 1 / 3, 0))

  def test_ignores_the_score_of_the_invalid(self):
    score = np.array([np.nan, 0.5], np.float32)
    _assert_near(_frequencies(score, np.array([False, True]), 0.15), [0, 1])

  def test_draws_something_where_nothing_is_valid(self):
    found = _frequencies(SCORE, ~ALL, 0.15)
    assert found.sum() == 1

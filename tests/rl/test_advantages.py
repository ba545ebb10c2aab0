"""Tests of returns and advantages (golden case l)."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r3jax.rl import advantages
from tests import goldens_lib


@functools.cache
def _golden() -> dict:
  return json.loads((goldens_lib.FOLDER / "l_advantages.json").read_text())


CASES = range(len(_golden()["cases"]))
DIRECT = {case["name"]: case for case in _golden()["compute_advantages_direct"]}


def _advantage(values, valid=None, divide_by_std=False) -> np.ndarray:
  """Returns the advantages of one group."""
  values = jnp.asarray(values, jnp.float32)[None]
  valid = jnp.ones(values.shape, bool) if valid is None else jnp.asarray(valid)[None]
  return np.asarray(advantages.group_advantage(values, valid, divide_by_std)[0])


class TestReturns:

  @pytest.mark.parametrize("i", CASES)
  def test_equal_golden_with_their_advantages(self, i):
    case, tolerance = _golden()["cases"][i], _golden()["tol"]
    score, form = (jnp.asarray(case[name], jnp.float32) for name in ("rewards", "format_rewards"))
    weight, out = case["format_reward_weight"], case["out"]
    close = functools.partial(np.testing.assert_allclose, atol=tolerance, rtol=0)
    if case["stage"] == "gen":
      total, edited = advantages.reason_return(score, form, weight), jnp.ones(score.shape, bool)
    else:
      stop = jnp.array(["no further edit" in text.lower() for text in case["edit_operations"]])
      before = jnp.full(score.shape, case["last_reward"], jnp.float32)
      total, edited = advantages.reflect_return(score, before, stop, form, weight), ~stop
      np.testing.assert_array_equal(edited, out["image_adv_mask"])
    close(total, out["total_rewards"])
    close(_advantage(total), out["text_advantages"])
    close(jnp.where(edited, _advantage(score), 0), out["image_advantages"])


class TestImprovement:

  def test_is_1_for_stopping_at_a_perfect_image_only(self):
    score, before = jnp.array([1.0, 0.4, 0.4, 1.0]), jnp.array([1.0, 1.0, 0.5, 1.0])
    stop = jnp.array([True, True, True, False])
    np.testing.assert_allclose(
        advantages.improvement(score, before, stop), [1, 1, -0.1, 0], atol=1e-6
    )


class TestGroupAdvantage:

  @pytest.mark.parametrize("name", ["divide_std", "single_sample"])
  def test_equals_golden(self, name):
    case = DIRECT[name]
    found = _advantage(
        np.ravel(case["rewards"]), divide_by_std=case["kwargs"].get("first_divide_std", False)
    )
    np.testing.assert_allclose(found, np.ravel(case["advantages"]), atol=_golden()["tol"])

  def test_equals_golden_for_groups_over_several_replicas(self):
    golden = _golden()["policy_groups"]
    values = jnp.asarray(golden["rewards_per_rank"]).reshape(2, -1)
    found = advantages.group_advantage(values, jnp.ones(values.shape, bool), False)
    expected = np.reshape(golden["advantages_per_rank"], values.shape)
    np.testing.assert_allclose(found, expected, atol=_golden()["tol"])

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
    np.testing.assert_array_equal(_advantage([0.5, 0.5, 0.5], divide_by_std=True), [0, 0, 0])

  def test_groups_do_not_mix(self):
    values = jnp.array([[0.0, 1.0], [10.0, 30.0]])
    found = jax.jit(advantages.group_advantage, static_argnums=2)(values, values >= 0, False)
    np.testing.assert_array_equal(found, [[-0.5, 0.5], [-10, 10]])

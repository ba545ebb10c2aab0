"""Tests of study/verdicts.py: differences over prompts and seeds, and the criteria."""

import numpy as np
import pytest

from r3jax.evaluation import bootstrap
from r3jax.study import declarations
from r3jax.study import measures
from r3jax.study import verdicts

NUM_PROMPTS = 60
DESIGN = bootstrap.Design(range(NUM_PROMPTS), ["a", "b"] * (NUM_PROMPTS // 2))


def values_of(*means, spread=0.05, seed=0):
  """Returns values of one run per mean, which vary by prompt."""
  rng = np.random.default_rng(seed)
  result = {}
  for number, mean in enumerate(means):
    noise = rng.normal(0, spread, NUM_PROMPTS)
    noise -= noise.mean()
    result[number] = measures.Measured(mean + noise, DESIGN)
  return result


def claim(says="more", least=0.02, than="b"):
  return declarations.Claim("text", "draft", "a", than, says, least)


def judge(draws, **settings):
  (verdict,) = verdicts.judge([claim(**settings)], [draws])
  return verdict


class TestOverSeeds:
  def test_one_seed_has_the_interval_over_prompts(self):
    values = values_of(0.5)
    draws = verdicts.of_arm(values, seed=0)
    expected = bootstrap.bootstrap_mean(values[0].values, 0, DESIGN)
    assert draws.estimate() == pytest.approx(expected)

  def test_seeds_widen_the_interval_as_student_does(self):
    means = np.array([0.50, 0.56, 0.47, 0.55])
    draws = verdicts.of_arm(values_of(*means, spread=1e-9), seed=0)
    estimate = draws.estimate()
    assert estimate.mean == pytest.approx(means.mean())
    half = 3.182 * means.std(ddof=1) / np.sqrt(4)
    width = (estimate.high - estimate.low) / 2
    assert 0.8 * half < width < 1.25 * half

  def test_values_of_a_run_vary_with_seeds_alone(self):
    design = bootstrap.Design(["run"], ["run"])
    values = {
      seed: measures.Measured(np.array([value]), design)
      for seed, value in enumerate((1.0, 2.0, 3.0))
    }
    estimate = verdicts.of_arm(values, 0).estimate()
    assert estimate.mean == 2 and estimate.low < 1.5 < 2.5 < estimate.high

  def test_seeds_are_paired_and_those_without_a_partner_left_out(self):
    arm = values_of(0.5, 0.9, 0.7)
    other = {seed: arm[seed] for seed in (0, 1)}
    draws = verdicts.difference(arm, other, 0)
    assert draws.num_seeds == 2
    assert draws.estimate() == (0, None, None)

  def test_the_model_before_training_stands_for_all_seeds(self):
    (before,) = values_of(0.4, seed=5).values()
    draws = verdicts.difference(values_of(0.5, 0.6), {None: before}, 0)
    assert draws.mean == pytest.approx(0.15) and draws.num_seeds == 2

  def test_what_is_missing_in_one_run_counts_in_none(self):
    arm = values_of(0.5, 0.5)
    arm[0].values[:10] = np.nan
    draws = verdicts.of_arm(arm, 0)
    expected = [bootstrap.mean(x.values[10:], _rest()) for x in arm.values()]
    assert draws.mean == pytest.approx(np.mean(expected))


def _rest():
  return bootstrap.Design(range(10, NUM_PROMPTS), DESIGN.strata[10:])


class TestHolm:
  def test_is_the_textbook_example(self):
    corrected = verdicts.holm([0.01, 0.04, 0.03, 0.005])
    assert corrected == pytest.approx([0.03, 0.06, 0.06, 0.02])

  def test_is_never_above_one(self):
    assert verdicts.holm([0.9, 0.8]) == [1.0, 1.0]


class TestVerdict:
  def test_clear_rise_is_held(self):
    draws = verdicts.difference(
      values_of(0.60, 0.61, 0.62), values_of(0.50, 0.51, 0.52, seed=1), 0
    )
    assert judge(draws).verdict == "held"
    assert judge(draws, says="not more").verdict == "not held"
    assert judge(draws, says="less").verdict == "not held"

  def test_no_difference_is_not_held_where_it_is_surely_small(self):
    draws = verdicts.difference(
      values_of(0.5, 0.501, 0.5, spread=0.01),
      values_of(0.5, 0.5, 0.501, spread=0.01, seed=1),
      0,
    )
    assert judge(draws).verdict == "not held"
    assert judge(draws, says="not more").verdict == "held"

  def test_what_is_not_sure_is_undecided(self):
    draws = verdicts.difference(
      values_of(0.5, 0.6, 0.45), values_of(0.48, 0.5, 0.51, seed=1), 0
    )
    assert judge(draws).verdict == "undecided"

  def test_fall_is_less(self):
    draws = verdicts.difference(
      values_of(0.40, 0.41, 0.40), values_of(0.50, 0.51, 0.52, seed=1), 0
    )
    assert judge(draws, says="less").verdict == "held"
    assert judge(draws).verdict == "not held"

  def test_one_seed_or_none_decides_nothing(self):
    draws = verdicts.difference(values_of(0.9), values_of(0.1), 0)
    assert judge(draws).verdict == "undecided"
    verdict = judge(None)
    assert (verdict.verdict, verdict.difference) == ("undecided", None)

  def test_draws_that_are_all_equal_decide_nothing(self):
    arm = values_of(0.5, 0.6)
    other = {
      seed: measures.Measured(x.values - 0.1, DESIGN) for seed, x in arm.items()
    }
    draws = verdicts.difference(arm, other, 0)
    assert judge(draws).verdict == "undecided"
    assert draws.estimate() == (pytest.approx(0.1), None, None)

  def test_many_claims_need_more(self):
    draws = verdicts.Draws(0.1, np.repeat([-0.1, 0.1], [10, 990]), 3)
    assert judge(draws, least=0.0).verdict == "held"
    claims = [claim(least=0.0)] * 10
    many = verdicts.judge(claims, [draws] + [None] * 9)
    assert many[0].verdict == "undecided"

  def test_no_difference_is_seldom_held(self):
    """Of 200 studies of 3 seeds without a difference, a tail of .025 is held some five times."""
    rng = np.random.default_rng(0)
    num_held = 0
    for number in range(200):
      arm = values_of(*rng.normal(0.5, 0.02, 3), seed=2 * number)
      other = values_of(*rng.normal(0.5, 0.02, 3), seed=2 * number + 1)
      num_held += judge(verdicts.difference(arm, other, 0)).verdict == "held"
    assert num_held <= 14

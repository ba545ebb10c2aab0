"""Tests of statistics.py."""

import numpy as np
import pytest

from r3jax.evaluation import bootstrap


class TestBootstrapMean:
  def test_interval_of_normal_values_is_the_closed_form(self):
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    mean, low, high = bootstrap.bootstrap_mean(values, seed=1)
    half = 1.96 * values.std() / np.sqrt(400)
    assert mean == pytest.approx(values.mean(), abs=1e-12)
    np.testing.assert_allclose(
      [low, high], [mean - half, mean + half], atol=0.05 * 2 * half
    )

  def test_interval_of_zeros_and_ones_is_the_binomial_one(self):
    values = [1.0] * 60 + [0.0] * 140
    mean, low, high = bootstrap.bootstrap_mean(values, seed=0)
    half = 1.96 * np.sqrt(0.3 * 0.7 / 200)
    assert mean == pytest.approx(0.3)
    np.testing.assert_allclose([low, high], [0.3 - half, 0.3 + half], atol=0.01)

  def test_interval_covers_the_true_mean_at_its_level(self):
    rng = np.random.default_rng(0)
    intervals = [
      bootstrap.bootstrap_mean(rng.normal(size=50), seed) for seed in range(100)
    ]
    covered = sum(low <= 0 <= high for _, low, high in intervals)
    assert 88 <= covered <= 99  # 95 +- 3 standard deviations of a binomial.

  def test_equal_values_have_no_width(self):
    assert bootstrap.bootstrap_mean([0.5] * 7, seed=0) == (0.5, 0.5, 0.5)

  def test_seed_decides_the_draws(self):
    values = np.arange(30.0) ** 2
    assert bootstrap.bootstrap_mean(values, 0) == bootstrap.bootstrap_mean(
      values, 0
    )
    assert bootstrap.bootstrap_mean(values, 0) != bootstrap.bootstrap_mean(
      values, 1
    )

  @pytest.mark.parametrize("values", [[], [1.0, float("nan")], [[1.0]]])
  def test_unusable_values_are_refused(self, values):
    with pytest.raises(ValueError, match="non-empty list of finite numbers"):
      bootstrap.bootstrap_mean(values, seed=0)


class TestDesign:
  def test_repeats_of_a_prompt_are_no_further_witnesses(self):
    values = np.random.default_rng(0).normal(size=200)
    repeated, prompts = np.repeat(values, 9), np.repeat(np.arange(200), 9)
    _, low, high = bootstrap.bootstrap_mean(
      repeated, 0, bootstrap.Design(prompts, ["tag"] * 1800)
    )
    half = 1.96 * values.std() / np.sqrt(200)
    np.testing.assert_allclose(
      [low, high], [values.mean() - half, values.mean() + half], atol=0.1 * half
    )

  def test_what_differs_between_tags_is_no_uncertainty(self):
    rng, tags = np.random.default_rng(0), np.repeat(["a", "b", "c"], 100)
    values = rng.normal(size=300) + np.repeat([0.0, 10.0, 20.0], 100)
    design = bootstrap.Design(range(300), tags)
    mean, low, high = bootstrap.bootstrap_mean(values, 0, design)
    half = 1.96 * np.sqrt(
      np.mean([values[tags == tag].var() for tag in "abc"]) / 300
    )
    np.testing.assert_allclose(
      [low, high], [mean - half, mean + half], atol=0.1 * half
    )

  def test_prompts_of_unequal_size_weigh_by_their_images(self):
    values = [1.0] * 15 + [0.0] * 5
    prompts = [*np.repeat(range(5), 3), *range(5, 10)]
    mean, low, high = bootstrap.bootstrap_mean(
      values, 0, bootstrap.Design(prompts, ["tag"] * 20)
    )
    # Two right prompts of ten are 6 of 14 images, eight are 24 of 26.
    assert (mean, low, high) == (0.75, pytest.approx(6 / 14), 24 / 26)

  def test_labels_that_are_missing_are_refused(self):
    with pytest.raises(
      ValueError, match="each of 2 values, got 1 and 2 labels"
    ):
      bootstrap.bootstrap_mean(
        [0.0, 1.0], 0, bootstrap.Design(["p"], ["a", "a"])
      )


class TestTooFewPrompts:
  """Draws of a single prompt are all equal: they measure nothing."""

  def test_fewer_than_five_prompts_have_no_interval(self):
    values = [0.0, 1.0] * 8
    prompts = ["p", "q", "r", "s"] * 4
    design = bootstrap.Design(prompts, ["a", "a", "b", "b"] * 4)
    estimate = bootstrap.bootstrap_mean(values, 0, design)
    assert estimate == (0.5, None, None) and estimate.interval is None

  def test_tags_of_one_prompt_are_drawn_together(self):
    gains = [0.0, 0.0, 0.5, -0.25, 0.0, 0.0]
    single = bootstrap.Design(range(6), list("abcdef"))
    together = bootstrap.Design(range(6), ["tag"] * 6)
    estimate = bootstrap.bootstrap_mean(gains, 0, single)
    assert estimate == bootstrap.bootstrap_mean(gains, 0, together)
    assert estimate.low < 0 < estimate.high

  def test_they_weigh_as_many_tags(self):
    # Three tags of one prompt, which vary, and one tag of ten equal prompts.
    values = [0.0, 0.0, 1.0] + [1.0] * 10
    design = bootstrap.Design(range(13), [*"abc", *["d"] * 10])
    estimate = bootstrap.bootstrap_mean(values, 0, design)
    assert estimate == pytest.approx((0.5, 0.25, 1.0))

  def test_one_tag_of_one_prompt_varies_as_the_others_do(self):
    values = np.random.default_rng(0).normal(size=1001)
    values[1000] = 7.0
    design = bootstrap.Design(range(1001), ["a"] * 1000 + ["b"])
    mean, low, high = bootstrap.bootstrap_mean(values, 0, design)
    # Half of a draw is one normal number, the other half a mean of a thousand.
    half = 1.96 * 0.5 * values[:1000].std()
    assert mean == pytest.approx((values[:1000].mean() + 7) / 2)
    np.testing.assert_allclose(
      [low, high], [mean - half, mean + half], atol=0.1 * half
    )


class TestBootstrapDifference:
  def test_pairing_removes_what_the_prompts_share(self):
    before = np.random.default_rng(0).normal(size=100) * 10
    assert bootstrap.bootstrap_difference(
      before, before + 0.25, seed=0
    ) == pytest.approx((0.25, 0.25, 0.25))

  def test_sign_is_after_minus_before(self):
    mean, low, high = bootstrap.bootstrap_difference(
      [0.0, 0.0, 0.0, 1.0, 1.0], [1.0] * 5, seed=0
    )
    assert mean == pytest.approx(3 / 5)
    assert (low, high) == (0.2, 1.0)

  def test_other_lengths_are_refused(self):
    with pytest.raises(ValueError, match="got 2 and 1 values"):
      bootstrap.bootstrap_difference([0.0, 1.0], [1.0], seed=0)

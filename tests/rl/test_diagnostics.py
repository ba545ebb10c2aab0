"""Tests of the metrics of a stage against numbers worked out by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from r3jax.rl import diagnostics
from r3jax.rl import pools
from r3jax.rl import returns
from tests import documented
from tests.rl import tables

SPREAD = (1 / 6) ** 0.5  # of the rewards 1, 0, 0.5


class TestReason:
  def test_are_means_over_valid_samples(self):
    table = tables.reason_table()
    advantages = returns.reason_advantages(table, tables.LOSS)
    metrics = diagnostics.reason(table, advantages)
    assert metrics == pytest.approx(
      {
        "strict": 2 / 3,  # of the three samples that have it
        "format": 4 / 6,
        "tokens": 5.0,
        "tokens_at_limit": 0.5,
        "nonfinite_images": 1 / 6,
        "score": 1.7 / 4,
        "valid": 4 / 6,
        "score_spread": SPREAD / 2,
        "text_advantage": (5 / 6 + 7 / 6 + 1 / 3) / 4,
        "image_advantage": 1.0 / 4,
        "spread_sde_early": SPREAD,
        "spread_sde_late": 0.0,
      },
      rel=1e-5,
    )

  def test_are_nan_where_there_is_nothing_to_average(self):
    table = tables.reason_table()
    table = table.replace(valid=jnp.zeros_like(table.valid))
    advantages = returns.reason_advantages(table, tables.LOSS)
    metrics = diagnostics.reason(table, advantages)
    assert np.isnan(metrics["score"]) and metrics["valid"] == 0
    assert metrics["score_spread"] == 0


class TestLeftOut:
  MEMBERS = {
    # The judge fails once, and calls two of the four images of low score invalid.
    "judge": [[1.0, -np.inf, np.nan], [-np.inf, 0.0, 1.0]],
    "eye": [[1.0, 0.0, 0.0], [0.25, 0.25, 0.5]],
  }

  def parts(self) -> dict:
    parts = {"strict": jnp.zeros((2, 3)), "judge/a/strict": jnp.zeros((2, 3))}
    for name, values in self.MEMBERS.items():
      parts[name] = parts[f"{name}/strict"] = jnp.array(values)
    return parts

  def test_is_counted_by_the_score_of_the_others(self):
    table = tables.reason_table().replace(parts=self.parts())
    advantages = returns.reason_advantages(table, tables.LOSS)
    metrics = diagnostics.reason(table, advantages)
    assert metrics["judge/invalid_when_low"] == 2 / 4
    assert metrics["judge/invalid_when_high"] == 0
    # Only images that the judge has scored count for the other member.
    assert metrics["eye/invalid_when_low"] == 0
    assert metrics["eye/invalid_when_high"] == 0
    assert not any(
      name.startswith("judge/a") for name in metrics if "inv" in name
    )

  def test_edits_that_stop_do_not_count(self):
    table = tables.edit_table().replace(parts=self.parts())
    advantages = returns.edit_advantages(table, tables.LOSS, own_sources=False)
    metrics = diagnostics.edit(table, advantages)
    # Left are [0, 2], whose judge failed, [1, 0] and [1, 2].
    assert metrics["judge/invalid_when_low"] == 1 / 2
    assert metrics["judge/invalid_when_high"] == 0

  def test_names_are_documented(self):
    reason_table = tables.reason_table().replace(parts=self.parts())
    reason = diagnostics.reason(
      reason_table, returns.reason_advantages(reason_table, tables.LOSS)
    )
    edit_table = tables.edit_table().replace(parts=self.parts())
    edit = diagnostics.edit(
      edit_table,
      returns.edit_advantages(edit_table, tables.LOSS, own_sources=False),
    )
    names = [f"reason/{name}" for name in reason]
    names += [f"edit/{name}" for name in edit]
    documented.check([name for name in names if "invalid" in name], "sum")

  def test_one_reward_alone_has_no_others(self):
    table = tables.reason_table()
    advantages = returns.reason_advantages(table, tables.LOSS)
    metrics = diagnostics.reason(table, advantages)
    assert not any("invalid" in name for name in metrics)


class TestEdit:
  def test_compares_with_the_image_before(self):
    table = tables.edit_table()
    advantages = returns.edit_advantages(table, tables.LOSS, own_sources=False)
    metrics = diagnostics.edit(table, advantages)
    expected = {
      "before": 0.75,
      "edit_rate": 0.5,
      "improvement": (-0.6 + 0.2 - 0.3) / 3,
      "improved": 1 / 6,
      "worse": 2 / 6,
      "stop_when_right": 2 / 3,
      "stop_when_wrong": 1 / 3,
      "stop_precision": 2 / 3,
      "pool_perfect": 0.5,
      "pool_prompts": 0.5,  # both groups drew an image of prompt 1
      "truncated": 1 / 6,
      "image_advantage": (0.4 + 0.7 / 3 + 0.8 / 3) / 6,
    }
    measured = {name: metrics[name] for name in expected}
    assert measured == pytest.approx(expected, rel=1e-5)


class TestPool:
  def test_counts_right_wrong_and_unscored(self):
    pool = pools.ScoredImages(
      images=jnp.zeros((4, 1, 1, 3), jnp.uint8),
      reward=jnp.array([1.0, 0.5, 1.0, np.nan]),
      valid=jnp.array([True, True, False, False]),
      parts={},
      prompt_index=jnp.zeros(4, jnp.int32),
    )
    metrics = diagnostics.pool(pool)
    assert metrics == {"right": 0.25, "wrong": 0.25, "unscored": 0.5}

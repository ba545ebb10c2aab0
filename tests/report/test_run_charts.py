"""Tests of report/run_charts.py and report/forest.py."""

import pathlib
import re

import pytest

from r3jax.evaluation import bootstrap
from r3jax.report import forest
from r3jax.report import run_charts
from tests import documented

_DOCS = pathlib.Path(__file__).parents[2] / "docs" / "metrics.md"
_PLANS = [plan for plans in run_charts.PLANS.values() for plan in plans]


class TestPlans:
  @pytest.mark.parametrize("plan", _PLANS, ids=lambda plan: plan.name)
  def test_explains_as_the_table_of_metrics_does(self, plan):
    table = re.sub(r"[`“”\"\\]", "", _DOCS.read_text())
    about = re.sub(r"[`“”\"]", "", plan.about)
    words = re.split(r"[.;:,]", about)[0]
    assert words in table

  def test_metrics_are_documented(self):
    patterns = [pattern for plan in _PLANS for pattern in plan.metrics]
    names = {row.name.replace("{stage}", "reason") for row in documented.rows()}
    names |= {name.replace("{edit}", "edit") for name in names}
    names |= {name.replace("{part}", "strict") for name in names}
    names |= {name.replace("strict", "clutter") for name in names}
    names |= {name.replace("reason", "edit") for name in names}
    without = [
      pattern
      for pattern in patterns
      if not any(re.fullmatch(pattern, name) for name in names)
    ]
    assert without == []


class TestSmoothed:
  def test_is_unbiased_and_keeps_gaps(self):
    curve = [(i, 0.5, None, None) for i in range(5)]
    curve.insert(2, (9, None, None, None))
    smooth = run_charts.smoothed(curve)
    assert smooth[2][1] is None
    values = [y for _, y, _, _ in smooth if y is not None]
    assert values == pytest.approx([0.5] * 5)


class TestForest:
  def test_marks_stand_at_their_scores_with_intervals_where_there_are_some(
    self,
  ):
    rows = [
      forest.Row(
        "counting",
        "24 prompts",
        bootstrap.Estimate(0.5, 0.0, 1.0),
        bootstrap.Estimate(1.0, 0.5, 1.0),
      ),
      forest.Row(
        "a tag of very many characters",
        "1 prompt",
        bootstrap.Estimate(0.0),
        None,
      ),
    ]
    drawing = forest.layout(rows)
    first, second = drawing.rows
    before, after = first.marks
    assert (before.low, before.x, before.high) == ("190.0", "365.0", "540.0")
    assert (after.low, after.x, after.high) == ("365.0", "540.0", "540.0")
    assert first.description == (
      "counting, 24 prompts: before 0.500 [0.000, 1.000]; "
      "after 1.000 [0.500, 1.000]"
    )
    (only,) = second.marks
    assert (only.kind, only.low) == ("before", "")
    assert second.amount == "1 prompt"
    assert "too few prompts for an interval" in second.description
    assert second.name.endswith("…")

  def test_nothing_is_drawn_of_nothing(self):
    assert forest.layout([]) is None

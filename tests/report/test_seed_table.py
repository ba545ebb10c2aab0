"""Tests for r3jax.report.seed_table."""

import pytest

from r3jax.report import seed_table


def summary(draft_after, stops_when_wrong):
  """Returns what a run's summary.json says, as far as the table reads it."""
  scores = {
    "draft": {
      "before": [0.7, 0.6, 0.8],
      "after": [draft_after, 0.0, 1.0],
      "difference": [draft_after - 0.7, -1.0, 1.0],
    }
  }
  for view in ("draft, strict", "last round", "last round, strict"):
    scores[view] = scores["draft"]
  behaviour = {
    "edit_rate": 0.4,
    "stop_when_right": 0.8,
    "stop_when_wrong": stops_when_wrong,
    "improvement": 0.25,
  }
  gain = [0.05, 0.0, 0.1]
  return {
    "scores": scores,
    "labelled images": {
      "judgement": {"before": [0.6, 0.5, 0.7], "after": [0.65, 0.6, 0.7]}
    },
    "last round minus draft": {"before": gain, "after": gain},
    "behaviour": {"before": behaviour, "after": behaviour},
  }


def line_of(text, label):
  (line,) = [line for line in text.splitlines() if f"| {label} |" in line]
  return [cell.strip() for cell in line.split("|")[2:-1]]


def test_has_means_and_ranges_over_seeds():
  summaries = [summary(0.9, 0.2), summary(0.8, None), summary(0.85, 0.4)]
  text = seed_table.to_markdown(seed_table.rows(summaries), "Of three runs.")
  assert text.startswith("Of three runs.\n\n| | before |")
  assert line_of(text, "draft") == [
    "0.700",
    "0.850",
    "0.800 to 0.900",
    "+0.150",
  ]
  assert line_of(text, "last round minus draft") == [
    "+0.050",
    "+0.050",
    "+0.050 to +0.050",
    "+0.000",
  ]


def test_has_the_judgement_of_labelled_images():
  rows = seed_table.rows([summary(0.9, 0.2), summary(0.8, 0.1)])
  text = seed_table.to_markdown(rows, "")
  assert line_of(text, "judgement of labelled images") == [
    "0.600",
    "0.650",
    "0.650 to 0.650",
    "+0.050",
  ]
  ita = line_of(text, "ITA-style accuracy on labelled images")
  assert ita == ["-", "-", "-", "-"]


def test_leaves_out_runs_without_the_number():
  rows = seed_table.rows([summary(0.9, 0.2), summary(0.8, None)])
  text = seed_table.to_markdown(rows, "")
  assert line_of(text, "stops when wrong") == [
    "0.200",
    "0.200",
    "0.200 to 0.200",
    "+0.000",
  ]
  rows = seed_table.rows([summary(0.9, None)])
  text = seed_table.to_markdown(rows, "")
  assert line_of(text, "stops when wrong") == ["-", "-", "-", "-"]


class TestReplaceBlock:
  PAGE = "before\n<!-- results: a -->\nold\n<!-- end of results: a -->\nafter\n"

  def test_keeps_the_rest_of_the_page(self):
    page = seed_table.replace_block(self.PAGE, "a", "new\nlines")
    assert page == self.PAGE.replace("old", "new\nlines")
    # The comments are still there, so that the next run finds them.
    assert seed_table.replace_block(page, "a", "old") == self.PAGE

  def test_names_the_comments_that_the_page_must_have(self):
    with pytest.raises(ValueError, match="<!-- results: b -->.*got 0 and 0"):
      seed_table.replace_block(self.PAGE, "b", "new")
    with pytest.raises(ValueError, match="got 2 and 2"):
      seed_table.replace_block(self.PAGE * 2, "a", "new")

"""Tests of docs/metrics.md; runs are held against it where they are tested (`documented.check`)."""

from tests import documented

CHECKED = {  # kind -> the test that holds it against a run
  "always": "run/test_loop.py",
  "tag": "run/test_loop.py",
  "samples": "run/test_loop.py",
  "evaluation": "run/test_loop.py",
  "labelled": "evaluation/test_labelled.py",
  "full chain": "rl/test_full_chain.py",
  "split": "rl/test_iteration.py",
  "service": "rewards/test_faults.py",
  "cache": "rewards/test_cache.py",
  "judge": "rewards/test_judge.py",
  "sum": "rl/test_diagnostics.py",
  "chip": "run/test_speed.py",
}


class TestTable:
  def test_every_kind_is_checked_somewhere(self):
    assert {row.when for row in documented.rows()} == set(CHECKED)

  def test_no_name_is_there_twice(self):
    names = [row.name for row in documented.rows()]
    assert len(names) == len(set(names)) > 60


class TestCheck:
  def test_tells_what_is_missing_and_what_is_not_documented(self):
    whens, parts = ("always", "tag"), ("strict",)
    assert (
      documented.undocumented(
        ["edit2/score", "reason/strict", "reason/tag/colors"],
        *whens,
        parts=parts,
      )
      == set()
    )
    names = [
      "reason/shaped",
      "reason/scores",
      "xreason/score",
      "seconds/stage/draft",
    ]
    assert documented.undocumented(names, *whens, parts=parts) == set(names)
    absent = documented.missing(
      ["reason/score", "reason/strict", "edit/tag/colors"], *whens, parts=parts
    )
    assert {
      "edit/score",
      "edit/strict",
      r"reason/tag/\w+",
      "seconds/step",
    } <= absent
    assert not {"reason/score", "reason/strict", r"edit/tag/\w+"} & absent

"""Tests of evaluation/comparison.py and finished.py, report/comparison_report.py and plots.py."""

import csv
import dataclasses
import json
import types

from etils import epath
from PIL import Image
import pytest

from r3jax.data import contamination
from r3jax.evaluation import bootstrap
from r3jax.evaluation import comparison
from r3jax.evaluation import finished
from r3jax.evaluation import sample_log
from r3jax.evaluation import summary
from r3jax.files import jsonl
from r3jax.report import comparison_report
from r3jax.report import evaluation_report
from r3jax.report import plots
from tests.evaluation import fakes

CONTEXT = summary.Context(
  "an evaluation", 0, contamination.Leaked({}, True), (1e12, 2e12), 0
)


def write(
  folder,
  step: int,
  gain: float = 0.0,
  leaked=None,
  sample_of=lambda sample: sample,
):
  """Writes an evaluation whose scores are higher than those of the fake by `gain`."""
  folder = epath.Path(folder)
  samples = []
  evaluation = fakes.evaluation(fakes.Sampler())
  for sample in evaluation.run(None, None, folder, step):
    turns = [
      dataclasses.replace(
        turn, score=turn.score + gain, chain_score=turn.chain_score + gain
      )
      for turn in sample.turns
    ]
    samples.append(sample_of(dataclasses.replace(sample, turns=turns)))
  sample_log.drop_after(folder, None)
  jsonl.append(
    folder / "samples.jsonl", [sample.to_json() for sample in samples]
  )
  evaluation_report.conclude(
    folder,
    samples,
    dataclasses.replace(
      CONTEXT, step=step, leaked=contamination.Leaked(leaked or {}, True)
    ),
  )


@pytest.fixture(name="runs", scope="module")
def fixture_runs(tmp_path_factory):
  folder = tmp_path_factory.mktemp("runs")
  for step, gain in ((0, 0.0), (20, 0.125)):
    write(folder / "a" / "evaluation" / f"step_{step:06d}", step, gain)
  write(folder / "b", 0, 0.25, {"counting": 1})
  return folder


class TestCompare:
  def test_of_one_run_the_evaluations_of_several_iterations(self, runs):
    compared = comparison.compare(finished.read(str(runs / "a")), seed=0)
    assert compared.names == [f"{runs / 'a'} @ 0", f"{runs / 'a'} @ 20"]
    assert {
      "draft",
      "round 2",
      "draft, strict",
      "draft, correct",
      "draft, color_attr, correct",
    } <= set(compared.views) and "last round" not in compared.views
    (difference,) = compared.views["draft"].differences
    assert difference == pytest.approx((0.125, 0.125, 0.125))

  def test_others_are_compared_with_the_first(self, runs):
    groups = [finished.read(str(runs / name)) for name in "ab"]
    compared = comparison.compare(
      [groups[0][0], groups[0][1], *groups[1]], seed=0
    )
    first, *_ = compared.views["round 2"].scores
    assert [
      one[0] - first[0] for one in compared.views["round 2"].scores
    ] == pytest.approx([0, 0.125, 0.25])

  def test_other_prompts_are_refused(self, runs, tmp_path):
    write(
      tmp_path,
      0,
      sample_of=lambda sample: dataclasses.replace(sample, prompt="p"),
    )
    with pytest.raises(ValueError, match="of the same prompts"):
      comparison.compare(
        [*finished.read(str(runs / "b")), *finished.read(str(tmp_path))], seed=0
      )

  def test_other_settings_are_noted(self, runs):
    first, second = finished.read(str(runs / "a"))
    other = dataclasses.replace(second, settings={"points": 50})
    assert comparison.compare([first, other], seed=0).notes == {
      other.name: ["Made with other settings: points 50, not 4."]
    }

  def test_one_is_not_enough(self, runs):
    with pytest.raises(ValueError, match="at least two"):
      comparison.compare(finished.read(str(runs / "b")), seed=0)

  def test_nothing_that_is_over_is_refused(self, tmp_path):
    with pytest.raises(ValueError, match="a finished evaluation"):
      finished.read(str(tmp_path))


class TestWrite:
  def test_files(self, runs, tmp_path):
    text = comparison_report.write(
      [finished.read(str(runs / name)) for name in "ab"],
      epath.Path(tmp_path),
      seed=0,
    )
    assert (tmp_path / "comparison.md").read_text() == text
    assert (
      "CONTAMINATED: the model was trained on 1 of these prompts (counting 1)."
      in text
    )
    header, *rows = csv.reader((tmp_path / "comparison.csv").open())
    names = ["a @ 20", "b (CONTAMINATED)"]
    assert header == [
      "of",
      "prompts",
      *(
        f"{name}{part}"
        for name in [*names, f"{names[1]} - {names[0]}"]
        for part in ("", ", low", ", high")
      ),
    ]
    assert rows[0][0] == "draft"
    difference, *bounds = rows[0][8:]
    # One tag has a single prompt, and the others have no variation to lend it.
    assert float(difference) == pytest.approx(0.125)
    assert [float(bound) for bound in bounds] == pytest.approx([0.125, 0.125])
    assert (
      json.loads((tmp_path / "comparison.json").read_text())["names"] == names
    )
    for name in ("by_round", "by_tag", "by_iteration"):
      with Image.open(tmp_path / f"{name}.png") as image:
        assert image.width > 600
      assert (tmp_path / f"{name}.svg").read_text().startswith("<?xml")

  def test_single_evaluations_have_no_curve_by_iteration(self, runs, tmp_path):
    write(tmp_path / "c", 0)
    comparison_report.write(
      [finished.read(str(runs / "b")), finished.read(str(tmp_path / "c"))],
      epath.Path(tmp_path / "out"),
      seed=0,
    )
    assert (
      not (tmp_path / "out" / "by_iteration.png").exists()
      and (tmp_path / "out" / "by_tag.svg").exists()
    )


class TestPlots:
  """Evaluations with shares of correct images have a second panel, with those."""

  @pytest.fixture(name="summaries")
  def fixture_summaries(self, runs):
    return [evaluation.summary for evaluation in finished.read(str(runs / "a"))]

  @staticmethod
  def labels(figure):
    return [axes.get_ylabel().partition(" (")[0] for axes in figure.axes]

  @staticmethod
  def line(axes, number=0):
    """Returns the means of a series of a panel."""
    return axes.containers[number].lines[0].get_ydata().tolist()

  def test_correct_by_round_stands_beside_the_score(self, summaries):
    first, _ = summaries
    figure = plots.by_round({"first": first})
    assert self.labels(figure) == ["score", "correct images"]
    scores, correct = figure.axes
    assert self.line(scores) == [numbers.score[0] for numbers in first.rounds]
    assert self.line(correct) == [
      estimate[0] for estimate in first.correct["all tags"]
    ]

  def test_correct_by_tag(self, summaries):
    first, _ = summaries
    _, correct = plots.by_tag({"first": first}).axes
    assert self.line(correct) == [
      first.correct[tag][-1][0] for tag in first.tags
    ]

  def test_correct_by_iteration(self, summaries):
    _, correct = plots.by_iteration({"a": summaries}).axes
    drafts, lasts = (
      [summary.correct["all tags"][number][0] for summary in summaries]
      for number in (0, -1)
    )
    assert [self.line(correct, 0), self.line(correct, 1)] == [drafts, lasts]

  def test_evaluation_without_correct_is_left_out_of_its_panel(self, summaries):
    first, second = summaries
    without = dataclasses.replace(second, correct={})
    scores, correct = plots.by_round({"a": first, "b": without}).axes
    assert (len(scores.containers), len(correct.containers)) == (2, 1)

  def test_no_panel_where_no_evaluation_has_it(self, summaries):
    first, _ = summaries
    without = dataclasses.replace(first, correct={})
    assert self.labels(plots.by_tag({"a": without})) == ["score"]


class TestNames:
  @pytest.mark.parametrize(
    "paths, names",
    [
      (["/r/x", "/r/y"], ["x", "y"]),
      (["x", "y"], ["x", "y"]),
      (["/r/x", "/s/y"], ["r/x", "s/y"]),
      (["r/x", "r/y/z"], ["x", "y/z"]),
      (["/r/x", "y"], ["/r/x", "y"]),
      (["gs://b/x", "gs://b/y"], ["x", "y"]),
    ],
  )
  def test_lose_the_folder_that_they_share(self, paths, names):
    groups = [
      [finished.FinishedEvaluation(f"{path} @ 3", path, {}, None, [])]
      for path in paths
    ]
    assert [
      group[0].name for group in comparison_report._shorten_names(groups)
    ] == [f"{name} @ 3" for name in names]


class TestNamesInPlots:
  def test_names_with_dollars_are_no_formulas(self, tmp_path):
    """Folders and tags come from users; Matplotlib reads $...$ as TeX, and refuses a wrong one."""
    wrong = "$\\frac{$"
    numbers = types.SimpleNamespace(score=bootstrap.Estimate(0.5, 0.4, 0.6))
    of_one = types.SimpleNamespace(
      rounds=[numbers], tags={wrong: [numbers.score]}, correct={}
    )
    for figure in (
      plots.by_round({wrong: of_one}),
      plots.by_tag({wrong: of_one}),
    ):
      plots.save(figure, epath.Path(tmp_path / "plot"))
    assert (tmp_path / "plot.png").exists()

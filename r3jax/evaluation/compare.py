"""Compares evaluations of the same prompts: paired differences by round, part and tag, in tables and plots."""

from collections.abc import Sequence
import dataclasses
import functools
import json
import os

from etils import epath

from r3jax.data import contamination
from r3jax.evaluation import evaluate
from r3jax.evaluation import numbers
from r3jax.evaluation import plots
from r3jax.evaluation import render
from r3jax.evaluation import result
from r3jax.evaluation import summary as summary_lib
from r3jax.files import config_guard
from r3jax.report import page


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """An evaluation that is over, read from its folder.

  Attributes:
    name: what it is called in tables and plots.
    run: name of the run that it belongs to; its own where it belongs to none.
    settings: what its results depend on beside the model.
    summary: see `summary.make`.
    samples: its lines, in the order of their keys.
  """

  name: str
  run: str
  settings: dict
  summary: dict
  samples: list[dict]

  @functools.cached_property
  def found(self) -> result.Result:
    """Its numbers."""
    return result.of_samples(self.samples)


def is_evaluation(folder: epath.Path) -> bool:
  """Returns whether a folder is that of an evaluation, over or not."""
  return (folder / "samples.jsonl").exists() or (
    folder / "samples.jsonl.parts"
  ).exists()


def _read_one(folder: epath.Path, name: str, of_run: str) -> Evaluation:
  latest = {sample["key"]: sample for sample in page.read_samples(folder)}
  settings, summary = (
    json.loads((folder / file).read_text())
    for file in (evaluate.SETTINGS, evaluate.SUMMARY)
  )
  return Evaluation(
    name, of_run, settings, summary, [latest[key] for key in sorted(latest)]
  )


def read(path: str) -> list[Evaluation]:
  """Reads an evaluation's folder, or all evaluations of a run's workdir, by iteration.

  Raises:
    ValueError: there is no evaluation that is over.
  """
  folder, name = epath.Path(path), path.rstrip("/")
  if is_evaluation(folder):
    found = (
      [_read_one(folder, name, name)]
      if (folder / evaluate.SUMMARY).exists()
      else []
    )
  else:
    inside = folder / "evaluation"
    steps = sorted(inside.iterdir()) if inside.exists() else []
    found = [
      _read_one(step, f"{name} @ {int(step.name[5:])}", name)
      for step in steps
      if (step / evaluate.SUMMARY).exists()
    ]
  if not found:
    raise ValueError(
      f"there must be an evaluation that is over in {path}, or in its folder evaluation; there is none"
    )
  return found


def _shortened(
  groups: Sequence[Sequence[Evaluation]],
) -> list[list[Evaluation]]:
  """Returns the same without the folder that all of them are in, in their names."""
  runs = [group[0].run for group in groups]
  if len({*map(os.path.isabs, runs)}) > 1:
    return [list(group) for group in groups]
  common = (
    os.path.commonpath([os.path.dirname(run_) for run_ in runs]) or os.curdir
  )
  short = {run_: os.path.relpath(run_, common) for run_ in runs}
  of = lambda one: dataclasses.replace(
    one,
    name=short[one.run] + one.name.removeprefix(one.run),
    run=short[one.run],
  )
  return [[of(one) for one in group] for group in groups]


def _labelled(one: Evaluation) -> Evaluation:
  """Returns an evaluation whose name, in tables and plots, says if the model was trained on its prompts."""
  label = (
    " (CONTAMINATED)"
    if contamination.Leaked(**one.summary["leaked"]).contaminated
    else ""
  )
  return dataclasses.replace(one, name=one.name + label, run=one.run + label)


def compare(evaluations: Sequence[Evaluation], seed: int) -> dict:
  """Returns every evaluation against the first.

  Returns:
    "names", "notes" (what must stand beside the numbers) and, by view (a round; with a part; with a
    tag), "scores": [mean, low, high] of each, and "differences" from the first, paired.

  Raises:
    ValueError: there is only one, or they are not of the same prompts.
  """
  if len(evaluations) < 2:
    raise ValueError(
      "at least two evaluations must be given (or a run that has two)"
    )
  first, *others = evaluations
  lengths = [len(one.found.score) for one in evaluations]
  rounds = {numbers.name_of(turn): turn for turn in range(min(lengths))}
  rounds |= {"last round": -1} if len(set(lengths)) > 1 else {}
  pairs = [
    numbers.compare(first.found, other.found, seed, rounds) for other in others
  ]
  views = {}
  for view in dict.fromkeys(name for pair in pairs for name in pair):
    of = [pair.get(view) for pair in pairs]
    before = next(one["before"] for one in of if one)
    views[view] = {
      "scores": [before, *(one and one["after"] for one in of)],
      "differences": [one and one["difference"] for one in of],
    }
  notes = {
    one.name: noted
    for one in evaluations
    if (noted := summary_lib.notes(one.summary) + _differing(first, one))
  }
  return {
    "names": [one.name for one in evaluations],
    "notes": notes,
    "views": views,
  }


def _differing(first: Evaluation, other: Evaluation) -> list[str]:
  """Returns a note where two evaluations were made with other settings."""
  changes = config_guard.differences(first.settings, other.settings)
  return (
    [
      "Made with other settings: "
      + ", ".join(
        f"{key} {new}, not {old}" for key, (old, new) in changes.items()
      )
      + "."
    ]
    if changes
    else []
  )


def table(compared: dict) -> page.Table:
  """Returns the comparison as a table: a row per view."""
  names = compared["names"]
  columns = ["of", *names, *(f"{name} - {names[0]}" for name in names[1:])]
  rows = [
    (
      view,
      [
        *map(page.with_interval, one["scores"]),
        *(page.change(view, value) for value in one["differences"]),
      ],
    )
    for view, one in compared["views"].items()
  ]
  return page.Table(
    "Scores with 95 % interval, and paired differences", columns, rows
  )


def write(
  groups: Sequence[Sequence[Evaluation]], folder: epath.Path, seed: int
) -> str:
  """Writes comparison.{md,csv,json} and plots (PNG and SVG) into a folder; returns the Markdown.

  Args:
    groups: as `read` returns them. Of one, all evaluations are compared; of several, the last of each,
      and the others are in the plot by iteration.
    folder: made if missing.
    seed: of the intervals.

  Raises:
    ValueError: as `compare`.
  """
  if not groups:
    raise ValueError(
      "at least two evaluations must be given (or a run that has two)"
    )
  groups = [[_labelled(one) for one in group] for group in _shortened(groups)]
  evaluations = (
    groups[0] if len(groups) == 1 else [group[-1] for group in groups]
  )
  compared = compare(evaluations, seed)
  made = table(compared)
  notes = [
    f"**{name}: {text}**"
    for name, texts in compared["notes"].items()
    for text in texts
  ]
  text = "\n\n".join([*notes, render.markdown(made)]) + "\n"
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "comparison.md").write_text(text)
  (folder / "comparison.csv").write_text(render.csv_text(made))
  (folder / "comparison.json").write_text(
    json.dumps(compared, indent=1, allow_nan=False) + "\n"
  )
  summaries = {one.name: one.summary for one in evaluations}
  by_run = {group[0].run: [one.summary for one in group] for group in groups}
  figures = {
    "by_round": plots.by_round(summaries),
    "by_tag": plots.by_tag(summaries),
    "by_iteration": plots.by_iteration(by_run),
  }
  for name, figure in figures.items():
    if figure:
      plots.save(figure, folder / name)
  return text

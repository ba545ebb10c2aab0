"""Writes a comparison of evaluations: tables in Markdown, CSV and JSON, and plots."""

from collections.abc import Sequence
import dataclasses
import json
import os

from etils import epath

from r3jax.evaluation import comparison
from r3jax.evaluation import finished
from r3jax.report import plots
from r3jax.report import tables

Evaluation = finished.FinishedEvaluation


def write(
  groups: Sequence[Sequence[Evaluation]], folder: epath.Path, seed: int
) -> str:
  """Writes comparison.{md,csv,json} and plots (PNG and SVG) into a folder.

  Args:
    groups: Evaluations by run, as `finished.read` returns them. Of one group all evaluations are
      compared; of several the last of each is, and the plot by iteration shows the others.
    folder: Made if missing.
    seed: Seed of the bootstrap.

  Returns:
    The Markdown.

  Raises:
    ValueError: As `comparison.compare`.
  """
  if not groups:
    raise ValueError(
      "at least two evaluations must be given (or a run that has two)"
    )
  groups = _shorten_names(groups)
  for group in groups:
    group[:] = map(_mark_contaminated, group)
  if len(groups) == 1:
    (evaluations,) = groups
  else:
    evaluations = [group[-1] for group in groups]
  compared = comparison.compare(evaluations, seed)

  folder.mkdir(parents=True, exist_ok=True)
  compared_table = table(compared)
  blocks = []
  for name, texts in compared.notes.items():
    blocks += [f"**{name}: {text}**" for text in texts]
  blocks.append(tables.markdown(compared_table))
  text = "\n\n".join(blocks) + "\n"
  (folder / "comparison.md").write_text(text)
  (folder / "comparison.csv").write_text(tables.csv_text(compared_table))
  json_text = json.dumps(compared.to_json(), indent=1, allow_nan=False)
  (folder / "comparison.json").write_text(json_text + "\n")

  summaries = {x.name: x.summary for x in evaluations}
  by_run = {}
  for group in groups:
    by_run[group[0].run] = [evaluation.summary for evaluation in group]
  plots.save(plots.by_round(summaries), folder / "by_round")
  plots.save(plots.by_tag(summaries), folder / "by_tag")
  by_iteration = plots.by_iteration(by_run)
  if by_iteration:
    plots.save(by_iteration, folder / "by_iteration")
  return text


def table(compared: comparison.Comparison) -> tables.Table:
  """Returns a comparison as a table with one row per view."""
  first, *others = compared.names
  differences = [f"{other} - {first}" for other in others]
  rows = []
  for view, numbers in compared.views.items():
    cells = [numbers.prompts, *numbers.scores]
    for difference in numbers.differences:
      cells.append(tables.difference(view, difference))
    rows.append((view, cells))
  return tables.Table(
    "Scores with 95 % interval, and paired differences",
    ["of", "prompts", *compared.names, *differences],
    rows,
  )


def _shorten_names(
  groups: Sequence[Sequence[Evaluation]],
) -> list[list[Evaluation]]:
  """Removes the folder that all runs share from the names of runs and evaluations."""
  runs = [group[0].run for group in groups]
  if len({os.path.isabs(run) for run in runs}) > 1:
    # Absolute and relative paths share no folder.
    return [list(group) for group in groups]
  parents = [os.path.dirname(run) for run in runs]
  common = os.path.commonpath(parents) or os.curdir

  def shorten(evaluation: Evaluation) -> Evaluation:
    """Returns an evaluation with names relative to the common folder."""
    run = os.path.relpath(evaluation.run, common)
    name = run + evaluation.name.removeprefix(evaluation.run)
    return dataclasses.replace(evaluation, name=name, run=run)

  return [list(map(shorten, group)) for group in groups]


def _mark_contaminated(evaluation: Evaluation) -> Evaluation:
  """Adds to its names that a model was trained on prompts of its evaluation, if it was."""
  if not evaluation.summary.leaked.contaminated:
    return evaluation
  mark = " (CONTAMINATED)"
  return dataclasses.replace(
    evaluation, name=evaluation.name + mark, run=evaluation.run + mark
  )

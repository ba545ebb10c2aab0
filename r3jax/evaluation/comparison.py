"""Compares evaluations of the same prompts: paired differences by round, part and tag."""

from collections.abc import Mapping, Sequence
import dataclasses

import numpy as np

from r3jax.evaluation import bootstrap
from r3jax.evaluation import estimates
from r3jax.evaluation import evaluate
from r3jax.evaluation import finished
from r3jax.evaluation import labelled_estimates
from r3jax.evaluation import sample_table
from r3jax.files import config_guard

Estimate = estimates.Estimate
SampleTable = sample_table.SampleTable


@dataclasses.dataclass(frozen=True)
class View:
  """Part of an evaluation's scores: a value per chain, of some chains.

  Attributes:
    values: One per chain, [n]; NaN where it is missing.
    columns: Indices of the chains that count.
  """

  values: np.ndarray
  columns: np.ndarray


@dataclasses.dataclass(frozen=True)
class PairedEstimates:
  """Scores of the images that are scored both before and after, and their paired difference.

  Attributes:
    before: Mean of the tags' means before.
    after: The same, after.
    difference: The second minus the first.
    prompts: Number of distinct prompts of these images; None in summaries of older versions.
  """

  before: Estimate
  after: Estimate
  difference: Estimate
  prompts: int | None = None


def _views(table: SampleTable, rounds: Mapping[str, int]) -> dict[str, View]:
  """Returns the scores of the named rounds: over all chains, by part, and by tag.

  The share of correct images is among them, overall and by tag, if a reward says which are.
  """
  tags = np.asarray(table.tags)
  every = np.arange(len(tags))
  views = {}
  for name, number in rounds.items():
    views[name] = View(table.score[number], every)
  for part, values in table.parts.items():
    for name, number in rounds.items():
      views[f"{name}, {part}"] = View(values[number], every)
  correct = table.correct
  if correct is not None:
    # In a sum of rewards it is the part of a member, which has another name.
    for name, number in rounds.items():
      views[f"{name}, {sample_table.CORRECT}"] = View(correct[number], every)
  for tag in table.distinct_tags:
    columns = every[tags == tag]
    for name, number in rounds.items():
      views[f"{name}, {tag}"] = View(table.score[number], columns)
    if correct is None:
      continue
    for name, number in rounds.items():
      view = f"{name}, {tag}, {sample_table.CORRECT}"
      views[view] = View(correct[number], columns)
  return views


def compare_pair(
  before: SampleTable,
  after: SampleTable,
  seed: int,
  rounds: Mapping[str, int] | None = None,
) -> dict[str, PairedEstimates]:
  """Estimates scores before and after, and the paired difference, by view.

  A view is a round, a round with a part of the score, or a round with a tag. Views in which no
  image has both scores are left out.

  Args:
    before: Evaluation.
    after: Evaluation of the same images, in the same order.
    seed: Seed of the bootstrap.
    rounds: Indices of the rounds to compare by name, draft and last round by default.

  Raises:
    ValueError: They are not of the same images.
  """
  if (before.prompts, before.tags) != (after.prompts, after.tags):
    raise ValueError(
      "evaluations that are compared must be of the same prompts, with as many images of each"
    )
  rounds = rounds or {"draft": 0, "last round": -1}
  new_views = _views(after, rounds)
  compared = {}
  for name, old in _views(before, rounds).items():
    new = new_views.get(name)
    if new is None:
      continue
    valid = np.isfinite(old.values) & np.isfinite(new.values)
    columns = old.columns[valid[old.columns]]
    if not columns.size:
      continue
    difference = new.values - old.values
    # Both have the same images, and the same draws of the bootstrap.
    compared[name] = PairedEstimates(
      before=estimates.score_estimate(old.values, before, seed, columns),
      after=estimates.score_estimate(new.values, before, seed, columns),
      difference=estimates.score_estimate(difference, before, seed, columns),
      prompts=before.num_prompts(columns),
    )
  return compared


def compare_answers(
  before: sample_table.AnswerTable, after: sample_table.AnswerTable, seed: int
) -> dict[str, PairedEstimates]:
  """Estimates how well two models answer the same questions, and the paired difference.

  Args:
    before: Answers to questions about labelled images.
    after: Answers to the same questions, in the same order.
    seed: Seed of the bootstrap.

  Returns:
    The numbers of `labelled_estimates.views_of` by name, without those that are missing; none
    where the questions differ.
  """
  questions = (before.kinds, before.prompts, before.expected)
  if questions != (after.kinds, after.prompts, after.expected):
    return {}
  new_views = labelled_estimates.views_of(after)
  compared = {}
  for name, old in labelled_estimates.views_of(before).items():
    new = new_views[name]
    design = labelled_estimates.design(before, old)
    old_pair = (old.parts, old.wholes)
    new_pair = (new.parts, new.wholes)
    value_before = bootstrap.bootstrap_ratio(*old_pair, seed, design)
    value_after = bootstrap.bootstrap_ratio(*new_pair, seed, design)
    difference = bootstrap.bootstrap_ratio_difference(
      old_pair, new_pair, seed, design
    )
    if value_before and value_after and difference:
      compared[name] = PairedEstimates(
        before=value_before,
        after=value_after,
        difference=difference,
        prompts=len(set(design.clusters)),
      )
  return compared


@dataclasses.dataclass(frozen=True)
class ViewComparison:
  """One view of several evaluations.

  Attributes:
    scores: Score of every evaluation; None where it has no image with both scores.
    differences: Paired difference of every further evaluation from the first.
    prompts: Number of distinct prompts behind the first score.
  """

  scores: list[Estimate | None]
  differences: list[Estimate | None]
  prompts: int | None


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Evaluations compared with the first of them.

  Attributes:
    names: Names of the evaluations.
    notes: What a reader must know beside the numbers, by name; only evaluations that have some.
    views: By view: a round, a round with a part of the score, or a round with a tag.
  """

  names: list[str]
  notes: dict[str, list[str]]
  views: dict[str, ViewComparison]

  def to_json(self) -> dict:
    """Returns JSON values."""
    return dataclasses.asdict(self)


def compare(
  evaluations: Sequence[finished.FinishedEvaluation], seed: int
) -> Comparison:
  """Compares every evaluation with the first.

  Raises:
    ValueError: There is only one, or they are not of the same prompts.
  """
  if len(evaluations) < 2:
    raise ValueError(
      "at least two evaluations must be given (or a run that has two)"
    )
  first, *others = evaluations
  lengths = [len(evaluation.table.score) for evaluation in evaluations]
  rounds = {estimates.round_name(i): i for i in range(min(lengths))}
  # Chains of different lengths still have a last image each.
  if min(lengths) < max(lengths):
    rounds["last round"] = -1
  pairs = []
  for other in others:
    pair = compare_pair(first.table, other.table, seed, rounds)
    answers = compare_answers(first.answers, other.answers, seed)
    for name, numbers in answers.items():
      pair[f"labelled images, {name}"] = numbers
    pairs.append(pair)

  views = {}
  for pair in pairs:
    for name in pair:
      if name not in views:
        views[name] = _view_comparison(pairs, name)
  notes = {}
  for evaluation in evaluations:
    texts = evaluation.summary.notes() + _different_settings(first, evaluation)
    if texts:
      notes[evaluation.name] = texts
  names = [evaluation.name for evaluation in evaluations]
  return Comparison(names, notes, views)


def _view_comparison(
  pairs: Sequence[Mapping[str, PairedEstimates]], view: str
) -> ViewComparison:
  """Returns one view of all pairs; at least one pair has it."""
  matches = [pair.get(view) for pair in pairs]
  first = next(match for match in matches if match)
  scores = [first.before]
  differences = []
  for match in matches:
    if match is None:
      scores.append(None)
      differences.append(None)
    else:
      scores.append(match.after)
      differences.append(match.difference)
  return ViewComparison(scores, differences, first.prompts)


def _different_settings(
  first: finished.FinishedEvaluation, other: finished.FinishedEvaluation
) -> list[str]:
  """Returns a note if two evaluations have different settings."""
  changes = config_guard.differences(first.settings, other.settings)
  texts = []
  for key, (old, new) in changes.items():
    if key in evaluate.MAY_DIFFER:
      continue
    texts.append(f"{key} {new}, not {old}")
  if not texts:
    return []
  return [f"Made with other settings: {', '.join(texts)}."]

"""What a study measures of a run: values of held-out prompts or images, or one of its training."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools

import numpy as np

from r3jax.evaluation import bootstrap
from r3jax.evaluation import finished
from r3jax.evaluation import labelled_estimates
from r3jax.evaluation import sample_table

Metrics = Sequence[Mapping[str, float | None]]
# Of the iterations of a run, those whose mean is the reward at its end.
_LAST_SHARE = 0.25


@dataclasses.dataclass(frozen=True)
class Measured:
  """Values of a run.

  Attributes:
    values: One per prompt or image, the same ones in all runs of a study, [n]; NaN where it is
      missing.
    design: How these were drawn.
  """

  values: np.ndarray
  design: bootstrap.Design


@dataclasses.dataclass(frozen=True)
class Measure:
  """Something that is measured of a run.

  Attributes:
    label: What it is, for people.
    read: (evaluation, metrics of the iterations) -> its values, None where there are none.
    is_signed: Whether it is a difference.
  """

  label: str
  read: Callable[[finished.FinishedEvaluation, Metrics], Measured | None]
  is_signed: bool = False


# --- Scores ---------------------------------------------------------------------------------------

_Value = Callable[[sample_table.SampleTable], np.ndarray | None]


def _scores(label: str, value: _Value, is_signed: bool = False) -> Measure:
  """Returns a measure of chains of images; `value` is None where an evaluation has it not."""

  def measure(
    evaluation: finished.FinishedEvaluation, metrics: Metrics
  ) -> Measured | None:
    del metrics
    table = evaluation.table
    values = value(table)
    if values is None:
      return None
    return Measured(values, table.design(np.arange(len(table.tags))))

  return Measure(label, measure, is_signed)


def _round(number: int, table: sample_table.SampleTable) -> np.ndarray | None:
  """Returns the scores of a round, counted from 0 for the draft."""
  return table.score[number] if number < len(table.score) else None


def _last_round(table: sample_table.SampleTable) -> np.ndarray:
  return table.score[-1]


def _refinement(table: sample_table.SampleTable) -> np.ndarray:
  return table.score[-1] - table.score[0]


def _late_gain(table: sample_table.SampleTable) -> np.ndarray | None:
  """Returns what rounds add after the second refinement."""
  return table.score[-1] - table.score[2] if len(table.score) > 3 else None


def _never_stopped(table: sample_table.SampleTable) -> np.ndarray | None:
  return table.chain_score[-1] if table.never_stops else None


def _best_image(table: sample_table.SampleTable) -> np.ndarray | None:
  return table.chain_score.max(0) if table.never_stops else None


def _stops_minus_never(table: sample_table.SampleTable) -> np.ndarray | None:
  if not table.never_stops:
    return None
  return table.score[-1] - table.chain_score[-1]


def _last_round_of_tag(
  tag: str, evaluation: finished.FinishedEvaluation, metrics: Metrics
) -> Measured | None:
  """Returns the last round's scores of one tag."""
  del metrics
  table = evaluation.table
  columns = np.flatnonzero(np.asarray(table.tags) == tag)
  if not columns.size:
    return None
  return Measured(table.score[-1][columns], table.design(columns))


# --- Labelled images ------------------------------------------------------------------------------


def _view(
  name: str, evaluation: finished.FinishedEvaluation, metrics: Metrics
) -> Measured | None:
  """Returns whether answers about labelled images are right, of one view."""
  del metrics
  view = labelled_estimates.views_of(evaluation.answers).get(name)
  if view is None:
    return None
  return Measured(
    view.parts, labelled_estimates.design(evaluation.answers, view)
  )


def _vqa(
  evaluation: finished.FinishedEvaluation, metrics: Metrics
) -> Measured | None:
  """Returns whether answers are right, of all kinds that are not about a prompt.

  Every right answer of every kind weighs the same.
  """
  parts = []
  clusters = []
  strata = []
  for kind in dict.fromkeys(evaluation.answers.kinds):
    if kind in labelled_estimates.ABOUT_PROMPTS:
      continue
    measured = _view(kind, evaluation, metrics)
    if measured is None:
      continue
    parts.append(measured.values)
    clusters += measured.design.clusters
    strata += measured.design.strata
  if not parts:
    return None
  return Measured(np.concatenate(parts), bootstrap.Design(clusters, strata))


# --- Training -------------------------------------------------------------------------------------


def _rewards(name: str, metrics: Metrics) -> np.ndarray:
  """Returns a metric of all iterations that have it."""
  values = [row.get(name) for row in metrics]
  return np.array([value for value in values if value is not None], float)


def _number(value: float) -> Measured:
  """Returns one value of a run, which says nothing about prompts."""
  return Measured(np.array([value]), bootstrap.Design(["run"], ["run"]))


def _at_the_end(
  name: str, evaluation: finished.FinishedEvaluation, metrics: Metrics
) -> Measured | None:
  """Returns a metric's mean over the last iterations of a run."""
  del evaluation
  values = _rewards(name, metrics)
  if not values.size:
    return None
  num_last = max(1, round(_LAST_SHARE * len(values)))
  return _number(float(values[-num_last:].mean()))


def _variation(
  evaluation: finished.FinishedEvaluation, metrics: Metrics
) -> Measured | None:
  """Returns how much the drafts' reward varies about its trend.

  It is sqrt(mean((r_{i+1} - r_i)²) / 2), the standard deviation of noise about a slow trend.
  """
  del evaluation
  steps = np.diff(_rewards("reason/score", metrics))
  if not steps.size:
    return None
  return _number(float(np.sqrt((steps**2).mean() / 2)))


MEASURES: Mapping[str, Measure] = {
  "draft": _scores("draft", functools.partial(_round, 0)),
  "round_2": _scores("round 2", functools.partial(_round, 1)),
  "round_3": _scores("round 3", functools.partial(_round, 2)),
  "round_4": _scores("round 4", functools.partial(_round, 3)),
  "round_5": _scores("round 5", functools.partial(_round, 4)),
  "round_6": _scores("round 6", functools.partial(_round, 5)),
  "last_round": _scores("last round", _last_round),
  "refinement": _scores("last round minus draft", _refinement, True),
  "late_gain": _scores("last round minus round 3", _late_gain, True),
  "never_stopped": _scores("never stopped", _never_stopped),
  "best_image": _scores("stopped at the best image", _best_image),
  "stops_minus_never": _scores(
    "its own stops minus never stopping", _stops_minus_never, True
  ),
  "last_round_counting": Measure(
    "last round, counting", functools.partial(_last_round_of_tag, "counting")
  ),
  "last_round_colors": Measure(
    "last round, colors", functools.partial(_last_round_of_tag, "colors")
  ),
  "judgement": Measure("judgement", functools.partial(_view, "judgement")),
  "judgement_counting": Measure(
    "judgement, counting", functools.partial(_view, "judgement, counting")
  ),
  "judgement_colors": Measure(
    "judgement, colors", functools.partial(_view, "judgement, colors")
  ),
  "stop_recall": Measure(
    "stops when right", functools.partial(_view, "judgement, recall of stop")
  ),
  "edit_recall": Measure(
    "edits when wrong", functools.partial(_view, "judgement, recall of edit")
  ),
  "match": Measure("ITA-style", functools.partial(_view, "match")),
  "vqa": Measure("VQA-style", _vqa),
  "training_draft": Measure(
    "reward of drafts, last quarter of training",
    functools.partial(_at_the_end, "reason/score"),
  ),
  "training_edit": Measure(
    "reward of edits, last quarter of training",
    functools.partial(_at_the_end, "edit/score"),
  ),
  "training_variation": Measure("variation of the drafts' reward", _variation),
}

"""Chooses the curves of a run: the scores on one chart, the others by what they answer."""

from collections.abc import Mapping, Sequence
import dataclasses
import re

from r3jax.evaluation import bootstrap
from r3jax.evaluation import summary
from r3jax.report import charts

# Weight of the past in a smoothed curve; a curve of few points is not smoothed.
_DECAY = 0.8
_FEWEST_SMOOTHED = 8
_SHARE = (0.0, 1.0)
_MISMATCH = "mismatch"


@dataclasses.dataclass(frozen=True)
class Plan:
  """A chart of metrics.

  Attributes:
    name: Heading.
    metrics: Patterns of the metrics that it shows.
    about: What they are, as docs/metrics.md says it.
    y_range: Ends of the vertical axis, see `charts.Chart`.
    is_log: Whether that axis is logarithmic.
  """

  name: str
  metrics: Sequence[str]
  about: str
  y_range: tuple[float, float] | None = None
  is_log: bool = False


# What the curves answer -> charts.
PLANS: Mapping[str, Sequence[Plan]] = {
  "Do images get better?": (
    Plan(
      "nothing at all is wrong",
      (r"(reason|edit\d*)/strict",),
      "a part of the reward: strict (nothing at all is wrong)",
      _SHARE,
    ),
    Plan(
      "before and after an edit",
      (r"edit\d*/before", r"edit\d*/score"),
      "score of the images that edits start from, and reward that training uses; an edit that "
      "stops has the score of its source image",
      _SHARE,
    ),
    Plan(
      "change by an edit",
      (r"edit\d*/improvement",),
      "change of the score by an edit, mean over those that edit",
    ),
    Plan(
      "images that show something unreadable",
      (r"(reason|edit\d*)/clutter",),
      "a part of the reward: clutter, the share of an image that cannot be read; less is better",
      _SHARE,
    ),
  ),
  "Does it judge its own images?": (
    Plan(
      "edits instead of stopping",
      (r"edit\d*/edit_rate",),
      "share of all samples that edit instead of saying “no further edit”",
      _SHARE,
    ),
    Plan(
      "stops",
      (r"edit\d*/stop_when_(right|wrong)",),
      "share of images with score 1, and of other images, at which the model stops",
      _SHARE,
    ),
  ),
  "Are the texts in order?": (
    Plan(
      "well-formed texts",
      (r"(reason|edit\d*)/format",),
      "share of all texts that have exactly one well-formed thought, and an instruction after it "
      "if one is required",
      _SHARE,
    ),
    Plan(
      "tokens",
      (r"(reason|edit\d*)/tokens",),
      "mean length of all texts, with begin and end tokens",
    ),
    Plan(
      "entropy of the next token",
      (r"(reason|edit\d*)/text_entropy",),
      "estimate of the entropy of the next token: mean of -log-prob of the sampled tokens",
    ),
  ),
  "Is there something to learn from?": (
    Plan(
      "spread of the score in a group",
      (r"(reason|edit\d*)/score_spread",),
      "standard deviation of the score within a group, mean over groups",
    ),
    Plan(
      "images with a score",
      (r"(reason|edit\d*)/valid",),
      "share of valid samples among all",
      _SHARE,
    ),
  ),
  "Are the updates sound?": (
    Plan(
      _MISMATCH,
      (r"mismatch/\w+",),
      "largest |ratio - 1| of a token and of an image: 0 up to rounding. A logarithmic axis has no "
      "place for 0. The line is the limit above which the run warns",
      is_log=True,
    ),
    Plan(
      "norm of the gradient",
      (r"(reason|edit\d*|chain)/gradient_norm",),
      "norm of the whole gradient, before clipping to optimizer.clip_norm",
    ),
    Plan(
      "KL divergence of texts",
      (r"(reason|edit\d*)/text_kl",),
      "KL divergence from the starting policy, before its weight; 0 if both weights are 0",
    ),
    Plan(
      "skipped updates",
      (r"optimizer/skipped",),
      "updates of the iteration that were skipped because they were not finite",
    ),
  ),
  "What does it cost?": (
    Plan(
      "seconds of an iteration",
      (r"seconds/(iteration|step)",),
      "time since the line before, and the step of it",
    ),
    Plan(
      "images per second",
      (r"perf/images_per_second",),
      "drafts and edits that were drawn, over seconds/step",
    ),
  ),
}


def groups(
  metrics: Sequence[Mapping], mismatch_limit: float | None
) -> dict[str, list[charts.Chart]]:
  """Returns the charts of a run by what they answer; those without any value are left out.

  Args:
    metrics: Objects of metrics.jsonl.
    mismatch_limit: Deviation of a ratio from 1 above which the run warns; None knows none.
  """
  # Drafts first, as in the main chart.
  names = sorted(set().union(*metrics), key=_place)
  drawn = {}
  for question, plans in PLANS.items():
    charts_of_question = []
    for plan in plans:
      threshold = mismatch_limit if plan.name == _MISMATCH else None
      series = [
        charts.Series(name, points(name, metrics))
        for name in names
        if any(re.fullmatch(pattern, name) for pattern in plan.metrics)
      ]
      if series:
        charts_of_question.append(
          charts.Chart(
            plan.name,
            series,
            about=plan.about,
            y_range=plan.y_range,
            is_log=plan.is_log,
            threshold=threshold,
          )
        )
    if charts_of_question:
      drawn[question] = charts_of_question
  return drawn


def _place(name: str) -> tuple[bool, str]:
  """Returns a key that sorts metrics of drafts before those of edits."""
  return "reason" not in name, name


def points(name: str, metrics: Sequence[Mapping]) -> list[charts.Point]:
  """Returns the points of a metric over iterations."""
  curve = []
  for row in metrics:
    value = row.get(name)
    # A line that was edited by hand may hold anything.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if name in row and (value is None or is_number):
      curve.append((row["step"], value, None, None))
  return curve


def smoothed(curve: Sequence[charts.Point]) -> list[charts.Point]:
  """Returns the exponential moving average of a curve, without a bias to its beginning."""
  average = 0.0
  weight = 0.0
  result = []
  for x, y, _, _ in curve:
    if y is not None:
      average = _DECAY * average + (1 - _DECAY) * y
      weight = _DECAY * weight + 1 - _DECAY
      y = average / weight
    result.append((x, y, None, None))
  return result


def lead(
  metrics: Sequence[Mapping], evaluations: Mapping[int, summary.Summary]
) -> charts.Chart:
  """Returns the chart of the scores in training, smoothed over faint raw, and on held-out prompts.

  Args:
    metrics: Objects of metrics.jsonl.
    evaluations: Evaluations of the run by iteration.
  """
  series = []
  for style, (label, name) in enumerate(
    (("training, drafts", "reason/score"), ("training, edits", "edit/score"))
  ):
    raw = points(name, metrics)
    if len(raw) < _FEWEST_SMOOTHED:
      series.append(charts.Series(label, raw, style=style))
      continue
    series.append(charts.Series(label, raw, is_faint=True, style=style))
    series.append(charts.Series(label, smoothed(raw), style=style))
  held_out = {"held-out, drafts": 0, "held-out, last round": -1}
  for style, (label, turn) in enumerate(held_out.items(), start=2):
    estimates = [
      (step, evaluation.rounds[turn].score)
      for step, evaluation in sorted(evaluations.items())
    ]
    series.append(charts.Series(label, _with_bands(estimates), style=style))
  return charts.Chart(
    "score",
    series,
    about="Training curves are means over the prompts of an iteration, smoothed over the faint raw "
    "ones. Held-out scores are means of the tags' means, with 95 % intervals.",
    y_range=_SHARE,
    frame=charts.WIDE,
  )


def _with_bands(
  estimates: Sequence[tuple[int, bootstrap.Estimate | None]],
) -> list[charts.Point]:
  """Returns the points of estimates by iteration, with their intervals."""
  curve = []
  for step, estimate in estimates:
    if estimate is None:
      curve.append((step, None, None, None))
    else:
      curve.append((step, estimate.mean, estimate.low, estimate.high))
  return curve

"""Plots evaluations with Matplotlib, as files for papers."""

from collections.abc import Iterable, Mapping, Sequence
import io
import itertools

from etils import epath
import matplotlib
import matplotlib.axes
import matplotlib.figure
import numpy as np

from r3jax.evaluation import bootstrap
from r3jax.evaluation import estimates
from r3jax.evaluation import summary as summary_lib

Figure = matplotlib.figure.Figure
Summary = summary_lib.Summary

_SCORE = "score"
_CORRECT = "correct images"
# Names of folders and tags are texts: a "$" begins no formula.
_as_texts = matplotlib.rc_context({"text.parse_math": False})

_MARKERS = "osD^v<>P*X"  # lines differ by more than their colours


def _quantities(summaries: Iterable[Summary]) -> tuple[str, ...]:
  """Returns what is plotted: the score, and GenEval's share of correct images if any has it."""
  if any(summary.correct for summary in summaries):
    return _SCORE, _CORRECT
  return (_SCORE,)


def _by_round(
  summary: Summary, quantity: str
) -> list[bootstrap.Estimate | None]:
  """Returns a quantity of every round, over all prompts."""
  if quantity == _SCORE:
    return [numbers.score for numbers in summary.rounds]
  no_estimates = [None] * len(summary.rounds)
  return summary.correct.get(estimates.ALL_TAGS, no_estimates)


def _last_of_tag(
  summary: Summary, quantity: str, tag: str
) -> bootstrap.Estimate | None:
  """Returns a quantity of the last round and a tag; None if the evaluation has none."""
  by_tag = summary.tags if quantity == _SCORE else summary.correct
  by_round = by_tag.get(tag)
  return by_round[-1] if by_round else None


def _new_figure(
  x_label: str, quantities: Sequence[str]
) -> tuple[Figure, list[matplotlib.axes.Axes]]:
  """Returns a figure with a panel per quantity, side by side."""
  figure = Figure(
    figsize=(6.4 * len(quantities), 4.0), layout="constrained", dpi=150
  )
  panels = []
  for number, quantity in enumerate(quantities, start=1):
    axes = figure.add_subplot(
      1,
      len(quantities),
      number,
      xlabel=x_label,
      ylabel=f"{quantity} (95 % interval)",
    )
    axes.grid(alpha=0.3)
    panels.append(axes)
  return figure, panels


def _plot(
  axes: matplotlib.axes.Axes,
  x: Sequence[float],
  estimates_at_x: Sequence[bootstrap.Estimate | None],
  label: str,
  number: int,
  linestyle: str = "-",
) -> None:
  """Plots means with their intervals; what is missing is left out."""
  present = [i for i, estimate in enumerate(estimates_at_x) if estimate]
  if not present:
    return
  # A bound that is missing is None, and NaN draws no bar.
  values = np.array([estimates_at_x[i] for i in present], float)
  means = values[:, 0]
  bounds = values[:, 1:]
  axes.errorbar(
    np.array([x[i] for i in present]),
    means,
    np.abs(bounds - means[:, None]).T,
    label=label,
    marker=_MARKERS[number % len(_MARKERS)],
    linestyle=linestyle,
    capsize=3,
  )


@_as_texts
def by_round(summaries: Mapping[str, Summary]) -> Figure:
  """Plots every quantity by round, one line per evaluation."""
  quantities = _quantities(summaries.values())
  figure, panels = _new_figure("round", quantities)
  for quantity, axes in zip(quantities, panels, strict=True):
    for number, (name, summary) in enumerate(summaries.items()):
      values = _by_round(summary, quantity)
      x = np.arange(1, len(values) + 1) + 0.03 * number
      _plot(axes, x, values, name, number)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
  return figure


@_as_texts
def by_tag(summaries: Mapping[str, Summary]) -> Figure:
  """Plots every quantity of the last round by tag, one series of points per evaluation."""
  tags = []
  for summary in summaries.values():
    tags += [tag for tag in summary.tags if tag not in tags]
  quantities = _quantities(summaries.values())
  figure, panels = _new_figure("tag", quantities)
  for quantity, axes in zip(quantities, panels, strict=True):
    for number, (name, summary) in enumerate(summaries.items()):
      offset = 0.6 * ((number + 0.5) / len(summaries) - 0.5)
      values = [_last_of_tag(summary, quantity, tag) for tag in tags]
      x = np.arange(len(tags)) + offset
      _plot(axes, x, values, name, number, linestyle="none")
    axes.set_xticks(range(len(tags)), tags, rotation=30, ha="right")
    axes.legend()
  return figure


@_as_texts
def by_iteration(runs: Mapping[str, Sequence[Summary]]) -> Figure | None:
  """Plots draft and last round by iteration; None if no run has several evaluations."""
  several = {name: run for name, run in runs.items() if len(run) > 1}
  if not several:
    return None
  quantities = _quantities(itertools.chain(*several.values()))
  figure, panels = _new_figure("iteration", quantities)
  for quantity, axes in zip(quantities, panels, strict=True):
    for number, (name, run) in enumerate(several.items()):
      ordered = sorted(run, key=lambda summary: summary.iteration)
      x = [summary.iteration for summary in ordered]
      values = [_by_round(summary, quantity) for summary in ordered]
      drafts = [rounds[0] for rounds in values]
      lasts = [rounds[-1] for rounds in values]
      _plot(axes, x, drafts, f"{name}, draft", 2 * number, linestyle="--")
      _plot(axes, x, lasts, f"{name}, last round", 2 * number + 1)
    axes.legend()
  return figure


@_as_texts
def save(figure: Figure, path: epath.Path) -> None:
  """Writes a figure as PATH.png and PATH.svg."""
  # Without the date, equal figures have equal files.
  for file_format, metadata in (("png", None), ("svg", {"Date": None})):
    file = io.BytesIO()
    figure.savefig(file, format=file_format, metadata=metadata)
    target = path.parent / f"{path.name}.{file_format}"
    target.write_bytes(file.getvalue())

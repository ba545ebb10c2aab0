"""Plots evaluations with Matplotlib, as files for papers."""

from collections.abc import Mapping, Sequence
import io

from etils import epath
import matplotlib.axes
import matplotlib.figure
import numpy as np

from r3jax.evaluation import bootstrap
from r3jax.evaluation import summary as summary_lib

Figure = matplotlib.figure.Figure
Summary = summary_lib.Summary

_MARKERS = "osD^v<>P*X"  # lines differ by more than their colours


def _new_figure(x_label: str) -> tuple[Figure, matplotlib.axes.Axes]:
  figure = Figure(figsize=(6.4, 4.0), layout="constrained", dpi=150)
  axes = figure.add_subplot(xlabel=x_label, ylabel="score (95 % interval)")
  axes.grid(alpha=0.3)
  return figure, axes


def _plot(
  axes: matplotlib.axes.Axes,
  x: Sequence[float],
  scores: Sequence[bootstrap.Estimate | None],
  label: str,
  number: int,
  linestyle: str = "-",
) -> None:
  """Plots means with their intervals; missing ones are left out."""
  present = [i for i, score in enumerate(scores) if score is not None]
  if not present:
    return
  values = np.array([scores[i] for i in present])
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


def by_round(summaries: Mapping[str, Summary]) -> Figure:
  """Plots the score by round, one line per evaluation."""
  figure, axes = _new_figure("round")
  for number, (name, summary) in enumerate(summaries.items()):
    scores = [estimates.score for estimates in summary.rounds]
    x = np.arange(1, len(scores) + 1) + 0.03 * number
    _plot(axes, x, scores, name, number)
  axes.xaxis.get_major_locator().set_params(integer=True)
  axes.legend()
  return figure


def by_tag(summaries: Mapping[str, Summary]) -> Figure:
  """Plots the score of the last round by tag, one series of points per evaluation."""
  figure, axes = _new_figure("tag")
  tags = []
  for summary in summaries.values():
    tags += [tag for tag in summary.tags if tag not in tags]
  for number, (name, summary) in enumerate(summaries.items()):
    offset = 0.6 * ((number + 0.5) / len(summaries) - 0.5)
    scores = []
    for tag in tags:
      tag_scores = summary.tags.get(tag)
      scores.append(tag_scores[-1] if tag_scores else None)
    x = np.arange(len(tags)) + offset
    _plot(axes, x, scores, name, number, linestyle="none")
  axes.set_xticks(range(len(tags)), tags, rotation=30, ha="right")
  axes.legend()
  return figure


def by_iteration(runs: Mapping[str, Sequence[Summary]]) -> Figure | None:
  """Plots draft and last round by iteration; None if no run has several evaluations."""
  several = {name: run for name, run in runs.items() if len(run) > 1}
  if not several:
    return None
  figure, axes = _new_figure("iteration")
  for number, (name, run) in enumerate(several.items()):
    ordered = sorted(run, key=lambda summary: summary.iteration)
    x = [summary.iteration for summary in ordered]
    drafts = [summary.rounds[0].score for summary in ordered]
    lasts = [summary.rounds[-1].score for summary in ordered]
    _plot(axes, x, drafts, f"{name}, draft", 2 * number, linestyle="--")
    _plot(axes, x, lasts, f"{name}, last round", 2 * number + 1)
  axes.legend()
  return figure


def save(figure: Figure, path: epath.Path) -> None:
  """Writes a figure as PATH.png and PATH.svg."""
  # Without the date, equal figures have equal files.
  for file_format, metadata in (("png", None), ("svg", {"Date": None})):
    file = io.BytesIO()
    figure.savefig(file, format=file_format, metadata=metadata)
    target = path.parent / f"{path.name}.{file_format}"
    target.write_bytes(file.getvalue())

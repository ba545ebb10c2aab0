"""Plots of evaluations; by Matplotlib, for its files go into papers."""

from collections.abc import Mapping, Sequence
import io

from etils import epath
from matplotlib import figure as figure_lib
import numpy as np

_MARKERS = "osD^v<>P*X"  # lines are told apart by more than their colours
_FORMATS = ("png", "svg")


def _axes(x_label: str):
  figure = figure_lib.Figure(figsize=(6.4, 4.0), layout="constrained", dpi=150)
  axes = figure.add_subplot(xlabel=x_label, ylabel="score (95 % interval)")
  axes.grid(alpha=0.3)
  return figure, axes


def _draw(
  axes,
  x,
  intervals: Sequence[Sequence[float] | None],
  label: str,
  number: int,
  line: str = "-",
):
  """Draws means with their intervals; what is missing is left out."""
  known = [(at, value) for at, value in zip(x, intervals) if value is not None]
  if not known:
    return
  at, values = (
    np.array([pair[0] for pair in known]),
    np.array([pair[1] for pair in known]),
  )
  reach = np.abs(values[:, 1:] - values[:, :1]).T
  axes.errorbar(
    at,
    values[:, 0],
    reach,
    label=label,
    marker=_MARKERS[number % len(_MARKERS)],
    linestyle=line,
    capsize=3,
  )


def by_round(summaries: Mapping[str, dict]) -> figure_lib.Figure:
  """Draws the score by round, a line per evaluation."""
  figure, axes = _axes("round")
  for number, (name, summary) in enumerate(summaries.items()):
    values = [one["score"] for one in summary["rounds"]]
    _draw(
      axes, np.arange(1, len(values) + 1) + 0.03 * number, values, name, number
    )
  axes.xaxis.get_major_locator().set_params(integer=True)
  axes.legend()
  return figure


def by_tag(summaries: Mapping[str, dict]) -> figure_lib.Figure:
  """Draws the score of the last round by tag, a series of points per evaluation."""
  figure, axes = _axes("tag")
  tags = list(
    dict.fromkeys(
      tag for summary in summaries.values() for tag in summary["tags"]
    )
  )
  for number, (name, summary) in enumerate(summaries.items()):
    place = np.arange(len(tags)) + 0.6 * ((number + 0.5) / len(summaries) - 0.5)
    _draw(
      axes,
      place,
      [
        summary["tags"][tag][-1] if tag in summary["tags"] else None
        for tag in tags
      ],
      name,
      number,
      "none",
    )
  axes.set_xticks(range(len(tags)), tags, rotation=30, ha="right")
  axes.legend()
  return figure


def by_iteration(
  runs: Mapping[str, Sequence[dict]],
) -> figure_lib.Figure | None:
  """Draws draft and last round by iteration, for runs with more than one evaluation; None without any."""
  several = {
    name: sorted(found, key=lambda one: one["iteration"])
    for name, found in runs.items()
    if len(found) > 1
  }
  if not several:
    return None
  figure, axes = _axes("iteration")
  for number, (name, found) in enumerate(several.items()):
    steps = [one["iteration"] for one in found]
    for offset, (turn, label, line) in enumerate(
      [(0, "draft", "--"), (-1, "last round", "-")]
    ):
      _draw(
        axes,
        steps,
        [one["rounds"][turn]["score"] for one in found],
        f"{name}, {label}",
        2 * number + offset,
        line,
      )
  axes.legend()
  return figure


def save(figure: figure_lib.Figure, path: epath.Path) -> None:
  """Writes a figure as PNG and SVG; the format's ending is added to the path."""
  for kind in _FORMATS:
    file = io.BytesIO()
    figure.savefig(
      file, format=kind, metadata={"Date": None} if kind == "svg" else None
    )
    (path.parent / f"{path.name}.{kind}").write_bytes(file.getvalue())

"""Lays out a forest plot as SVG: before and after with their intervals, a row per tag."""

from collections.abc import Sequence
import dataclasses

from r3jax.evaluation import bootstrap
from r3jax.report import charts

Estimate = bootstrap.Estimate

WIDTH = 560
_LEFT = 190  # where the axis begins; names of rows stand before it
_RIGHT = 540
_TOP = 12
_ROW = 34  # height of a row
_SHIFT = 5  # of the two marks of a row from its middle
_MAX_NAME = 24  # characters that fit before the axis
# Scores lie in [0, 1].
_TICKS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


@dataclasses.dataclass(frozen=True)
class Row:
  """What a forest plot says of a tag.

  Attributes:
    name: Name of the tag.
    amount: What its scores rest on, such as "24 prompts".
    before: Score before training.
    after: Score after it; None where it is not known yet.
  """

  name: str
  amount: str
  before: Estimate | None
  after: Estimate | None


@dataclasses.dataclass(frozen=True)
class Mark:
  """An estimate in the coordinates of the drawing.

  Attributes:
    kind: "before" or "after".
    x: Place of the mean.
    low: Place of the lower bound; "" without an interval.
    high: Place of the upper bound; "" without an interval.
    y: Height.
  """

  kind: str
  x: str
  low: str
  high: str
  y: str


@dataclasses.dataclass(frozen=True)
class DrawnRow:
  """A row in the coordinates of the drawing.

  Attributes:
    name: Name of the tag, shortened.
    amount: What its scores rest on.
    y: Height of its middle.
    marks: Its estimates.
    description: The row in words.
  """

  name: str
  amount: str
  y: str
  marks: Sequence[Mark]
  description: str


@dataclasses.dataclass(frozen=True)
class Drawing:
  """A forest plot in the coordinates of an SVG of WIDTH x `height`.

  Attributes:
    height: Height of the drawing.
    bottom: Height of the axis.
    left: Place of the least score.
    right: Place of the greatest score.
    ticks: Places and texts of the axis.
    rows: Rows from top to bottom.
  """

  height: int
  bottom: int
  left: int
  right: int
  ticks: Sequence[tuple[str, str]]
  rows: Sequence[DrawnRow]


def layout(rows: Sequence[Row]) -> Drawing | None:
  """Returns the drawing of rows; None where there are none."""
  if not rows:
    return None
  scale = charts.Scale(_TICKS[0], _TICKS[-1], _LEFT, _RIGHT)
  drawn = []
  for number, row in enumerate(rows):
    middle = _TOP + _ROW * (number + 0.5)
    marks = []
    texts = []
    for kind, estimate, y in (
      ("before", row.before, middle - _SHIFT),
      ("after", row.after, middle + _SHIFT),
    ):
      if estimate is not None:
        marks.append(_mark(kind, estimate, y, scale))
        texts.append(f"{kind} {_in_words(estimate)}")
    drawn.append(
      DrawnRow(
        name=_shortened(row.name),
        amount=row.amount,
        y=f"{middle:.1f}",
        marks=marks,
        description=f"{row.name}, {row.amount}: {'; '.join(texts)}",
      )
    )
  bottom = _TOP + _ROW * len(rows)
  return Drawing(
    height=bottom + 26,
    bottom=bottom,
    left=_LEFT,
    right=_RIGHT,
    ticks=charts.placed(list(_TICKS), scale),
    rows=drawn,
  )


def _mark(kind: str, estimate: Estimate, y: float, scale: charts.Scale) -> Mark:
  low = ""
  high = ""
  if estimate.interval is not None:
    low, high = (scale(bound) for bound in estimate.interval)
  return Mark(kind, scale(estimate.mean), low, high, f"{y:.1f}")


def _in_words(estimate: Estimate) -> str:
  if estimate.interval is None:
    return f"{estimate.mean:.3f}, too few prompts for an interval"
  low, high = estimate.interval
  return f"{estimate.mean:.3f} [{low:.3f}, {high:.3f}]"


def _shortened(name: str) -> str:
  return name if len(name) <= _MAX_NAME else f"{name[: _MAX_NAME - 1]}…"

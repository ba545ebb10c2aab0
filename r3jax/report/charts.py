"""Lays out line charts as SVG: round ticks, curves that break at missing values, bands of intervals."""

from collections.abc import Iterator, Sequence
import dataclasses
import itertools
import math

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 350, 10, 164  # of the plot inside the drawing
MAX_POINTS = 400  # of a curve; longer ones are thinned
_DOTS = 12  # a curve of so few points shows each of them

Point = tuple[float, float | None, float | None, float | None]


@dataclasses.dataclass(frozen=True)
class Series:
  """A curve of a chart.

  Attributes:
    label: what it is called in the legend.
    points: (x, y, low, high) by rising x. y is None where the value is missing; low and high bound
      the interval of y, both None where there is none.
  """

  label: str
  points: Sequence[Point]


@dataclasses.dataclass(frozen=True)
class Chart:
  """Curves over one axis.

  Attributes:
    name: the heading.
    series: the curves; those without any value are left out.
    x_label: what x counts.
  """

  name: str
  series: Sequence[Series]
  x_label: str = "iteration"


@dataclasses.dataclass(frozen=True)
class Curve:
  """A series in the coordinates of the drawing."""

  label: str
  style: int  # which of the styles of lines
  # "x,y x,y ..." of each stretch without missing values
  lines: list[str]
  bands: list[str]  # outlines of the intervals
  dots: list[tuple[str, str]]
  low: str
  high: str
  last: str
  points: list[Point]  # after thinning, in the units of the chart


@dataclasses.dataclass(frozen=True)
class Drawing:
  """A chart in the coordinates of an SVG of WIDTH x HEIGHT.

  Attributes:
    name: the heading.
    x_label: what x counts.
    label: the chart in words.
    curves: at least one.
    x_ticks: (place, text).
    y_ticks: (place, text).
    reach: the first and the last x.
  """

  name: str
  x_label: str
  label: str
  curves: list[Curve]
  x_ticks: list[tuple[str, str]]
  y_ticks: list[tuple[str, str]]
  reach: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class _Scale:
  """The straight line from [low, high] to [start, stop] of the drawing."""

  low: float
  high: float
  start: float
  stop: float

  def __call__(self, value: float) -> str:
    share = (
      (value - self.low) / (self.high - self.low)
      if self.high > self.low
      else 0.5
    )
    return f"{self.start + share * (self.stop - self.start):.1f}"


def layout(chart: Chart) -> Drawing | None:
  """Returns a chart's drawing, None if it has no value."""
  thinned = lambda item: _thin([_clean(point) for point in item.points])
  series = [
    (index, item.label, thinned(item))
    for index, item in enumerate(chart.series)
  ]
  series = [
    item for item in series if any(y is not None for _, y, _, _ in item[2])
  ]
  if not series:
    return None
  points = [point for _, _, some in series for point in some]
  values = [value for _, *rest in points for value in rest if value is not None]
  places = [x for x, *_ in points]
  first, last = min(places), max(places)
  y_ticks = _around(min(values), max(values))
  x_ticks = _within(first, last)
  across, down = (
    _Scale(first, last, LEFT, RIGHT),
    _Scale(y_ticks[0], y_ticks[-1], BOTTOM, TOP),
  )
  curves = [
    _curve(index, label, some, across, down) for index, label, some in series
  ]
  name = lambda curve: f"{curve.label} " if len(curves) > 1 else ""
  said = "; ".join(
    f"{name(curve)}between {curve.low} and {curve.high}, last {curve.last}"
    for curve in curves
  )
  return Drawing(
    chart.name,
    chart.x_label,
    f"{chart.name} over {chart.x_label} {first:g} to {last:g}: {said}",
    curves,
    list(zip(map(across, x_ticks), _texts(x_ticks))),
    list(zip(map(down, y_ticks), _texts(y_ticks))),
    (first, last),
  )


def _clean(point: Point) -> Point:
  """Takes what is not finite for missing."""
  x, *rest = point
  return x, *(
    value if value is not None and math.isfinite(value) else None
    for value in rest
  )


def _thin(points: list[Point]) -> list[Point]:
  """Returns every n-th point and the last, at most MAX_POINTS + 1."""
  stride = math.ceil(len(points) / MAX_POINTS) or 1
  return points[::stride] + (points[-1:] if (len(points) - 1) % stride else [])


def _curve(
  index: int, label: str, points: list[Point], across: _Scale, down: _Scale
) -> Curve:
  stretches = list(_stretches(points))
  banded = [
    [point for point in stretch if None not in point] for stretch in stretches
  ]
  outline = lambda band: [
    *((x, high) for x, _, _, high in band),
    *((x, low) for x, _, low, _ in reversed(band)),
  ]
  path = lambda places: " ".join(f"{across(x)},{down(y)}" for x, y in places)
  known = [point for stretch in stretches for point in stretch]
  dotted = (
    known
    if len(known) <= _DOTS
    else [stretch[0] for stretch in stretches if len(stretch) == 1]
  )
  values = [y for _, y, _, _ in known]
  return Curve(
    label,
    index,
    [path((x, y) for x, y, _, _ in stretch) for stretch in stretches],
    [path(outline(band)) for band in banded if len(band) > 1],
    [(across(x), down(y)) for x, y, _, _ in dotted],
    f"{min(values):.4g}",
    f"{max(values):.4g}",
    f"{values[-1]:.4g}",
    points,
  )


def _stretches(points: list[Point]) -> Iterator[list[Point]]:
  """Yields the runs of points that have a value."""
  for known, group in itertools.groupby(
    points, lambda point: point[1] is not None
  ):
    if known:
      yield list(group)


def _step(span: float) -> float:
  """Returns the least of 1, 2, 5 times a power of ten that cuts a span into at most five."""
  power = 10.0 ** math.floor(math.log10(span / 5))
  return next(
    power * factor
    for factor in (1, 2, 5, 10)
    if power * factor * 5 >= span * (1 - 1e-9)
  )


def _around(low: float, high: float) -> list[float]:
  """Returns round numbers from at most `low` to at least `high`."""
  if high - low <= 1e-9 * max(abs(low), abs(high)):
    margin = abs(low) / 10 or 0.5
    low, high = low - margin, high + margin
  step = _step(high - low)
  start, stop = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
  return [number * step for number in range(start, stop + 1)]


def _within(low: float, high: float) -> list[float]:
  """Returns round numbers between `low` and `high`; only `low` if they are one."""
  if high <= low:
    return [low]
  whole = float(low).is_integer() and float(high).is_integer()
  step = max(_step(high - low), 1) if whole else _step(high - low)
  return [
    number * step
    for number in range(
      math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1
    )
  ]


def _texts(ticks: list[float]) -> list[str]:
  """Returns the ticks with as many decimals as tell them apart."""
  step = ticks[1] - ticks[0] if len(ticks) > 1 else 1
  if step < 1e-4 or max(map(abs, ticks)) >= 1e5:
    return [f"{tick:.3g}" for tick in ticks]
  decimals = max(0, -math.floor(math.log10(step * (1 + 1e-9))))
  return [f"{tick + 0.0:.{decimals}f}" for tick in ticks]

"""Lays out line charts as SVG: round ticks, gaps at missing values, bands for intervals."""

from collections.abc import Iterator, Sequence
import dataclasses
import itertools
import math

MAX_POINTS = 400  # of a curve; longer ones are thinned
_MAX_DOTS = 12  # a curve of at most so many points shows each of them
_MAX_DECADES = 5  # between the ticks of a logarithmic axis
_TOLERANCE = 1e-9  # relative; keeps rounding from adding or dropping a tick

# x, and y with the bounds of its interval
Point = tuple[float, float | None, float | None, float | None]


@dataclasses.dataclass(frozen=True)
class Frame:
  """The size of a drawing, and the edges of the plot inside it, in units of the SVG.

  Attributes:
    width: Width of the drawing.
    height: Height of the drawing.
    left: Left edge of the plot.
    right: Right edge of the plot.
    top: Upper edge of the plot.
    bottom: Lower edge of the plot.
  """

  width: int
  height: int
  left: int
  right: int
  top: int
  bottom: int


SMALL = Frame(width=360, height=190, left=46, right=350, top=10, bottom=164)
WIDE = Frame(width=720, height=300, left=46, right=710, top=10, bottom=274)


@dataclasses.dataclass(frozen=True)
class Series:
  """A curve of a chart.

  Attributes:
    label: Name in the legend.
    points: (x, y, low, high) by rising x. y is None where the value is missing; low and high bound
      its interval, both None where there is none.
    is_faint: Whether it stands behind the others, without a place in the legend and in the numbers.
    style: Number of its colour and dashes; None takes its place among the series.
  """

  label: str
  points: Sequence[Point]
  is_faint: bool = False
  style: int | None = None


@dataclasses.dataclass(frozen=True)
class Chart:
  """Curves over one axis.

  Attributes:
    name: Heading.
    series: Curves; those without any value are left out.
    x_label: What x counts.
    about: What the curves are, in a sentence or two; "" says nothing.
    y_range: Ends of the vertical axis; None takes round numbers around the values. Values beyond
      it widen it.
    is_log: Whether the vertical axis is logarithmic; values that are not above 0 are missing.
    threshold: Height of a line across the plot; None draws none.
    frame: Size of the drawing.
  """

  name: str
  series: Sequence[Series]
  x_label: str = "iteration"
  about: str = ""
  y_range: tuple[float, float] | None = None
  is_log: bool = False
  threshold: float | None = None
  frame: Frame = SMALL


@dataclasses.dataclass(frozen=True)
class Curve:
  """A series in the coordinates of the drawing.

  Attributes:
    label: Name in the legend.
    style: Index of the series, which selects the style of its line.
    lines: "x,y x,y ..." of each stretch without missing values.
    bands: Outlines of the intervals, in the same form.
    dots: Points that are drawn as dots.
    low: Least value as text.
    high: Greatest value as text.
    last: Last value as text.
    points: Points after thinning, in the units of the chart.
    is_faint: See `Series`.
  """

  label: str
  style: int
  lines: list[str]
  bands: list[str]
  dots: list[tuple[str, str]]
  low: str
  high: str
  last: str
  points: list[Point]
  is_faint: bool


@dataclasses.dataclass(frozen=True)
class Drawing:
  """A chart in the coordinates of an SVG.

  Attributes:
    name: Heading.
    x_label: What x counts.
    description: The chart in words, for readers who do not see it.
    curves: Curves, at least one.
    x_ticks: Places and texts.
    y_ticks: Places and texts.
    x_range: First and last x.
    frame: Size of the SVG.
    about: What the curves are.
    threshold: Place of a line across the plot, "" without one.
  """

  name: str
  x_label: str
  description: str
  curves: list[Curve]
  x_ticks: list[tuple[str, str]]
  y_ticks: list[tuple[str, str]]
  x_range: tuple[float, float]
  frame: Frame
  about: str
  threshold: str

  @property
  def named(self) -> list[Curve]:
    """The curves of the legend."""
    return [curve for curve in self.curves if not curve.is_faint]


@dataclasses.dataclass(frozen=True)
class Scale:
  """Maps [low, high] to [start, stop] of a drawing, linearly or by logarithms."""

  low: float
  high: float
  start: float
  stop: float
  is_log: bool = False

  def __call__(self, value: float) -> str:
    """Returns the place of a value as text."""
    low, high = self.low, self.high
    if self.is_log:
      low, high, value = math.log(low), math.log(high), math.log(value)
    share = 0.5
    if high > low:
      share = (value - low) / (high - low)
    return f"{self.start + share * (self.stop - self.start):.1f}"


def layout(chart: Chart) -> Drawing | None:
  """Returns the drawing of a chart, None if it has no value."""
  shown = []
  for index, series in enumerate(chart.series):
    points = [_drawable(point, chart.is_log) for point in series.points]
    points = _thin(points)
    if any(y is not None for _, y, _, _ in points):
      style = index if series.style is None else series.style
      shown.append((series, style, points))
  if not shown:
    return None

  places = []
  values = []
  for _, _, points in shown:
    for x, *y_and_bounds in points:
      places.append(x)
      values += [value for value in y_and_bounds if value is not None]
  if chart.threshold is not None:
    values.append(chart.threshold)
  first = min(places)
  last = max(places)
  frame = chart.frame
  y_ticks = _y_ticks(chart, min(values), max(values))
  x_ticks = _ticks_within(first, last)
  x_scale = Scale(first, last, frame.left, frame.right)
  y_scale = Scale(
    y_ticks[0], y_ticks[-1], frame.bottom, frame.top, chart.is_log
  )
  curves = [
    _curve(series, style, points, x_scale, y_scale)
    for series, style, points in shown
  ]
  subject = f"{chart.name} over {chart.x_label} {first:g} to {last:g}"
  threshold = "" if chart.threshold is None else y_scale(chart.threshold)
  drawing = Drawing(
    name=chart.name,
    x_label=chart.x_label,
    description=f"{subject}: {_describe(curves)}",
    curves=curves,
    x_ticks=placed(x_ticks, x_scale),
    y_ticks=placed(y_ticks, y_scale),
    x_range=(first, last),
    frame=frame,
    about=chart.about,
    threshold=threshold,
  )
  return drawing


def _y_ticks(chart: Chart, low: float, high: float) -> list[float]:
  """Returns the ticks of the vertical axis of a chart whose values lie between two numbers."""
  if chart.is_log:
    first = math.floor(math.log10(low))
    last = max(math.ceil(math.log10(high)), first + 1)
    stride = math.ceil((last - first) / _MAX_DECADES)
    last = first + math.ceil((last - first) / stride) * stride
    return [10.0**power for power in range(first, last + 1, stride)]
  if chart.y_range is not None:
    least, most = chart.y_range
    low, high = min(low, least), max(high, most)
  return _ticks_around(low, high)


def _describe(curves: Sequence[Curve]) -> str:
  """Returns the range and the last value of curves in words."""
  texts = []
  named = [curve for curve in curves if not curve.is_faint]
  for curve in named:
    name = f"{curve.label} " if len(named) > 1 else ""
    texts.append(
      f"{name}between {curve.low} and {curve.high}, last {curve.last}"
    )
  return "; ".join(texts)


def _drawable(point: Point, is_log: bool) -> Point:
  """Replaces values by None that are not finite, or have no logarithm where one is needed."""
  x, *values = point
  for i, value in enumerate(values):
    if value is None:
      continue
    if not math.isfinite(value) or (is_log and value <= 0):
      values[i] = None
  return x, *values


def _thin(points: list[Point]) -> list[Point]:
  """Returns every n-th point and the last, at most MAX_POINTS + 1."""
  stride = math.ceil(len(points) / MAX_POINTS) or 1
  thinned = points[::stride]
  if (len(points) - 1) % stride:
    thinned = thinned + points[-1:]
  return thinned


def _curve(
  series: Series,
  style: int,
  points: list[Point],
  x_scale: Scale,
  y_scale: Scale,
) -> Curve:
  """Returns a series with at least one value in the coordinates of the drawing."""

  def path(places: Sequence[tuple[float, float]]) -> str:
    """Returns "x,y x,y ..." in the coordinates of the drawing."""
    return " ".join(f"{x_scale(x)},{y_scale(y)}" for x, y in places)

  lines = []
  bands = []
  present = []
  single = []
  for stretch in _stretches(points):
    present += stretch
    if len(stretch) == 1:
      single += stretch
    lines.append(path([(x, y) for x, y, _, _ in stretch]))
    bounded = [point for point in stretch if None not in point]
    if len(bounded) > 1:
      upper = [(x, high) for x, _, _, high in bounded]
      lower = [(x, low) for x, _, low, _ in reversed(bounded)]
      bands.append(path(upper + lower))

  # A stretch of one point has no line, so that it needs a dot.
  dotted = single
  if len(present) <= _MAX_DOTS:
    dotted = present
  values = [y for _, y, _, _ in present]
  return Curve(
    label=series.label,
    style=style,
    lines=lines,
    bands=bands,
    dots=[(x_scale(x), y_scale(y)) for x, y, _, _ in dotted],
    low=f"{min(values):.4g}",
    high=f"{max(values):.4g}",
    last=f"{values[-1]:.4g}",
    points=points,
    is_faint=series.is_faint,
  )


def _stretches(points: list[Point]) -> Iterator[list[Point]]:
  """Yields the runs of points that have a value."""

  def has_value(point: Point) -> bool:
    """Returns whether y is there."""
    return point[1] is not None

  for present, group in itertools.groupby(points, has_value):
    if present:
      yield list(group)


def _tick_distance(span: float) -> float:
  """Returns the least of 1, 2, 5 times a power of ten that cuts a span into at most five."""
  power = 10.0 ** math.floor(math.log10(span / 5))
  for factor in (1, 2, 5):
    if power * factor * 5 >= span * (1 - _TOLERANCE):
      return power * factor
  return power * 10


def _ticks_around(low: float, high: float) -> list[float]:
  """Returns round numbers from at most `low` to at least `high`."""
  if high - low <= _TOLERANCE * max(abs(low), abs(high)):
    margin = abs(low) / 10 or 0.5
    low -= margin
    high += margin
  distance = _tick_distance(high - low)
  start = math.floor(low / distance + _TOLERANCE)
  stop = math.ceil(high / distance - _TOLERANCE)
  return [number * distance for number in range(start, stop + 1)]


def _ticks_within(low: float, high: float) -> list[float]:
  """Returns round numbers between `low` and `high`; only `low` if they are equal."""
  if high <= low:
    return [low]
  distance = _tick_distance(high - low)
  if float(low).is_integer() and float(high).is_integer():
    distance = max(distance, 1)
  start = math.ceil(low / distance - _TOLERANCE)
  stop = math.floor(high / distance + _TOLERANCE)
  return [number * distance for number in range(start, stop + 1)]


def placed(ticks: list[float], scale: Scale) -> list[tuple[str, str]]:
  """Returns places and texts of ticks, with as many decimals as tell them apart."""
  distance = 1
  if len(ticks) > 1:
    distance = ticks[1] - ticks[0]
  if scale.is_log or distance < 1e-4 or max(map(abs, ticks)) >= 1e5:
    texts = [f"{tick:.3g}" for tick in ticks]
  else:
    magnitude = math.floor(math.log10(distance * (1 + _TOLERANCE)))
    decimals = max(0, -magnitude)
    # Adding 0.0 turns -0.0 into 0.0.
    texts = [f"{tick + 0.0:.{decimals}f}" for tick in ticks]
  return [(scale(tick), text) for tick, text in zip(ticks, texts, strict=True)]

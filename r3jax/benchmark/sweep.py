"""Measures the parts of an iteration at several sizes of groups, images and thoughts.

Where a part takes its operations at one rate, a line a + b * operations fits its seconds.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses

import jax
import matplotlib.figure
import ml_collections
import numpy as np

from r3jax.benchmark import measure
from r3jax.benchmark import parts
from r3jax.benchmark import subject
from r3jax.benchmark import workload

# What varies while everything else stays as the config has it: keys, and the values of all of them.
AXES = {
  "samples of a group": (("group_size",), (4, 8, 16, 32)),
  "pixels along a side": (
    ("image.height", "image.width"),
    (128, 256, 384, 512),
  ),
  "tokens of a thought": (("sequence.thought_tokens",), (32, 64, 96, 128)),
}


@dataclasses.dataclass(frozen=True)
class Point:
  """A part at one size.

  Attributes:
    axis: what varies, a key of AXES.
    value: its value.
    part: name of the part.
    flops: operations of one run.
    seconds: median of the timed runs.
  """

  axis: str
  value: int
  part: str
  flops: float
  seconds: float


@dataclasses.dataclass(frozen=True)
class Line:
  """The line seconds = start + slope * operations that fits the points of a part best.

  Attributes:
    start: seconds.
    slope: seconds per operation.
    r_squared: share of the variance of the seconds that the line explains.
  """

  start: float
  slope: float
  r_squared: float


def variations(
  config: ml_collections.ConfigDict,
) -> Iterator[tuple[str, int, ml_collections.ConfigDict]]:
  """Yields (axis, value, config) of every size."""
  for axis, (keys, values) in AXES.items():
    for value in values:
      varied = config.copy_and_resolve_references()
      varied.update_from_flattened_dict(dict.fromkeys(keys, value))
      yield axis, value, varied


def run(
  config: ml_collections.ConfigDict,
  names: Sequence[str],
  note: Callable[[Point], None],
) -> list[Point]:
  """Measures parts at every size.

  Args:
    config: see `configs/benchmark.py`.
    names: of the parts.
    note: called with every point.

  Raises:
    ValueError: a config cannot run on the devices.
  """
  timer = measure.Timer(config.benchmark.warmup, config.benchmark.repeats)
  points = []
  for axis, value, varied in variations(config):
    session, policy = subject.build(varied)
    workloads = workload.of_programs(session)
    measurements: list[measure.Measurement] = []
    with jax.set_mesh(session.mesh):
      recorder = parts.Recorder(session.mesh, timer, names, measurements.append)
      parts.measure_parts(session, session.init(policy), recorder)
    for measurement in measurements:
      flops = workloads[measurement.name].cost.flops
      point = Point(
        axis, value, measurement.name, flops, measurement.median_seconds
      )
      points.append(point)
      note(point)
  return points


def fit(points: Sequence[Point]) -> Line:
  """Returns the line of least squares through the points of a part.

  With fewer than three different numbers of operations every line fits, and nothing is explained:
  R² is NaN then.
  """
  flops = np.array([point.flops for point in points])
  seconds = np.array([point.seconds for point in points])
  slope, start = np.polyfit(flops, seconds, 1)
  residual = seconds - (start + slope * flops)
  r_squared = np.nan
  if len(set(flops)) > 2:
    r_squared = 1 - np.sum(residual**2) / np.sum(
      (seconds - seconds.mean()) ** 2
    )
  return Line(float(start), float(slope), float(r_squared))


def by_part(points: Sequence[Point]) -> dict[str, list[Point]]:
  """Returns the points of every part."""
  result: dict[str, list[Point]] = {}
  for point in points:
    result.setdefault(point.part, []).append(point)
  return result


def table(points: Sequence[Point]) -> str:
  """Returns the fitted lines in Markdown."""
  lines = ["| part | points | s at the start | GFLOP/s | R² |"]
  lines.append("| --- | --- | --- | --- | --- |")
  for name, of_part in by_part(points).items():
    line = fit(of_part)
    rate = 1 / line.slope / 1e9
    lines.append(
      f"| {name} | {len(of_part)} | {line.start:.3f} | {rate:.1f} | {line.r_squared:.3f} |"
    )
  return "\n".join(lines)


def plot(points: Sequence[Point]) -> matplotlib.figure.Figure:
  """Plots the seconds of every part by operations, with its line."""
  figure = matplotlib.figure.Figure(
    figsize=(6.4, 4.8), layout="constrained", dpi=150
  )
  axes = figure.add_subplot(
    xlabel="GFLOP", ylabel="seconds", xscale="log", yscale="log"
  )
  axes.grid(alpha=0.3)
  for name, of_part in by_part(points).items():
    flops = np.array(sorted(point.flops for point in of_part))
    line = fit(of_part)
    (drawn,) = axes.plot(
      flops / 1e9, line.start + line.slope * flops, label=name
    )
    axes.scatter(
      [point.flops / 1e9 for point in of_part],
      [point.seconds for point in of_part],
      color=drawn.get_color(),
      s=12,
    )
  axes.legend()
  return figure

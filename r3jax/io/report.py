"""Renders a run as one static HTML page: scores, curves and a gallery of rollouts.

The page carries its images, styles and script; it loads nothing and can be mailed. A summary is
  {"title": str,
   "scores": {name: {"before": [mean, low, high], "after": [...], "difference": [...]}},
   "seconds": {stage: float},
   "versions": {package: str}}
where every part may be missing; the bounds are those of 95 % intervals (statistics.Interval).

`python -m r3jax.io.report WORKDIR` prints what the summary.json of a run says.
"""

import base64
from collections.abc import Sequence
import dataclasses
import io
import json
import math
import sys

from etils import epath
import numpy as np
from PIL import Image

from r3jax.io import images as images_lib
from r3jax.io import jsonl
from r3jax.io import pages

_CHART_WIDTH, _CHART_HEIGHT, _CHART_POINTS = 320, 120, 400


@dataclasses.dataclass(frozen=True)
class RolloutSample:
  """One sample of a logged iteration, from prompt to refined image."""
  step: int
  prompt: str
  tag: str
  thought: str                      # text of the reason stage
  draft: np.ndarray                 # uint8 [H, W, 3]
  draft_score: float                # in [0, 1]; NaN if the reward is missing
  reflection: str = ""              # text of the reflect stage before the instruction
  instruction: str = ""
  refined: np.ndarray | None = None # uint8 [H, W, 3]; None if there was no refine stage
  refined_score: float = math.nan   # in [0, 1]; NaN if missing


@dataclasses.dataclass(frozen=True)
class _Chart:
  """A metric's curve, in the coordinates of an SVG of _CHART_WIDTH x _CHART_HEIGHT."""
  name: str
  lines: list[str]                  # "x,y x,y ..." of each stretch without missing values
  low: str
  high: str
  last: str
  steps: tuple[int, int]            # the first and the last


def append_samples(folder: epath.PathLike, samples: Sequence[RolloutSample]) -> None:
  """Adds samples to folder/samples.jsonl, from which the page is made after any restart."""
  epath.Path(folder).mkdir(parents=True, exist_ok=True)
  jsonl.append(epath.Path(folder) / "samples.jsonl", map(_to_json, samples))


def drop_samples_after(folder: epath.PathLike, step: int | None) -> None:
  """Drops the samples of steps that a resumed run repeats: later than `step`, or all if None."""
  jsonl.drop_after(epath.Path(folder) / "samples.jsonl", step)


def read_samples(folder: epath.PathLike) -> list[RolloutSample]:
  """Returns the samples of folder/samples.jsonl in the order of their writing."""
  return [_from_json(obj) for obj in jsonl.read(epath.Path(folder) / "samples.jsonl")]


def write_report(folder: epath.PathLike, summary: dict, metrics: Sequence[dict],
                 samples: Sequence[RolloutSample], charts: Sequence[str] | None = None
                 ) -> epath.Path:
  """Writes folder/index.html.

  Args:
    folder: the run's report folder.
    summary: see the module's docstring.
    metrics: the objects of metrics.jsonl.
    samples: what the gallery shows, in order; `read_samples(folder)` for a whole run.
    charts: names of the metrics to draw, in order; all if None.

  Returns:
    The path of the page.
  """
  names = charts if charts is not None else sorted({name for row in metrics for name in row}
                                                   - {"step"})
  filters = {"png": _png_base64, "score": _format_score}
  page = pages.template("report.html.j2", filters).render(
      title=summary.get("title", "r3jax run"),
      scores=summary.get("scores", {}),
      seconds=summary.get("seconds", {}),
      versions=summary.get("versions", {}),
      charts=[chart for chart in (_chart(name, metrics) for name in names) if chart],
      chart_size=(_CHART_WIDTH, _CHART_HEIGHT),
      iterations=_by_step(samples),
      tags=sorted({sample.tag for sample in samples}),
  )
  path = epath.Path(folder) / "index.html"
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(page)
  return path


def summary_lines(summary: dict) -> list[str]:
  """Returns a line for every score: before, after, and the difference with its interval."""
  lines = []
  for name, score in summary.get("scores", {}).items():
    mean, low, high = score["difference"]
    verdict = "better" if low > 0 else "worse" if high < 0 else "no clear change"
    lines.append(f"{name}: {score['before'][0]:.3f} -> {score['after'][0]:.3f}  "
                 f"({mean:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}: {verdict})")
  return lines


def _by_step(samples: Sequence[RolloutSample]) -> list[tuple[int, list[RolloutSample]]]:
  """Groups samples by iteration, the latest first."""
  groups = {}
  for sample in samples:
    groups.setdefault(sample.step, []).append(sample)
  return sorted(groups.items(), reverse=True)


def _chart(name: str, metrics: Sequence[dict]) -> _Chart | None:
  """Returns the curve of a metric, or None if it has no value."""
  rows = [(row["step"], row[name]) for row in metrics if name in row]
  values = [value for _, value in rows if value is not None]
  if not values:
    return None
  rows = rows[::math.ceil(len(rows) / _CHART_POINTS)]
  low, high = min(values), max(values)
  first, last = rows[0][0], rows[-1][0]
  stretches = [[]]
  for step, value in rows:
    if value is None:
      stretches.append([])
    else:
      x = _CHART_WIDTH * (step - first) / max(last - first, 1)
      y = _CHART_HEIGHT * (1 - (value - low) / (high - low)) if high > low else _CHART_HEIGHT / 2
      stretches[-1].append(f"{x:.1f},{y:.1f}")
  lines = [" ".join(stretch) for stretch in stretches if stretch]
  return _Chart(name, lines, f"{low:.5g}", f"{high:.5g}", f"{values[-1]:.5g}", (first, last))


def _format_score(score: float) -> str:
  return "missing" if math.isnan(score) else f"{score:.2f}"


def _to_json(sample: RolloutSample) -> dict:
  """Returns a sample as JSON: images as base64 PNG, missing scores as null."""
  obj = {field.name: getattr(sample, field.name) for field in dataclasses.fields(sample)}
  for name in ("draft", "refined"):
    obj[name] = None if obj[name] is None else _png_base64(obj[name])
  for name in ("draft_score", "refined_score"):
    obj[name] = None if math.isnan(obj[name]) else float(obj[name])
  return obj | {"step": int(sample.step)}


def _from_json(obj: dict) -> RolloutSample:
  """Inverts _to_json."""
  images = {name: None if obj[name] is None else _from_png_base64(obj[name])
            for name in ("draft", "refined")}
  scores = {name: math.nan if obj[name] is None else obj[name]
            for name in ("draft_score", "refined_score")}
  return RolloutSample(**(obj | images | scores))


def _png_base64(image: np.ndarray) -> str:
  return base64.b64encode(images_lib.png(image)).decode()


def _from_png_base64(text: str) -> np.ndarray:
  return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


if __name__ == "__main__":
  workdir = epath.Path(sys.argv[1])
  print(f"report: {workdir / 'report' / 'index.html'}")
  print("\n".join(summary_lines(json.loads((workdir / "summary.json").read_text()))))

"""Renders a run or an evaluation as one static HTML page: scores, curves and a gallery of samples.

The page is folder/index.html. Its styles, script and data are inside; its images are files beside it.
It loads nothing else, so it is read from a disk, a bucket or a web server alike.

A sample is a JSON object, a line of folder/samples.jsonl:
  {"step": int,      # the iteration it is of
   "key": str,       # no two samples share one; links name it
   "prompt": str, "tag": str,
   "turns": [
     {"image": str,           # path of the PNG file, relative to the folder
      "label": str,           # optional: "draft" for the first turn, then "round 2", ...
      "score": float | None,  # in [0, 1], 1 is right; None if missing
      "parts": {name: float | None}, "format": float | None,  # optional
      "text": str,            # the thought
      "instruction": str,     # of the edit that made the image
      "stop": bool,           # asked for no further edit: the image is that of the turn before
      "tokens": int,          # optional: of the text
      "boxes": [{"label": str, "box": [y0, x0, y1, x1]}]}],  # optional: shares of the image
   "answers": [              # optional: what the model answered about the first image
     {"kind": str, "question": str, "expected": str, "answer": str}]}

A run's summary is
  {"title": str,
   "scores": {name: {"before": [mean, low, high], "after": [...], "difference": [...]}},
   "last round minus draft": {"before": [mean, low, high] | None, "after": ...},
   "behaviour": {"before": {name: float}, "after": {name: float}},
   "images without a score": {"before": share, "after": share},
   "leaked": {"tags": {tag: int}, "complete": bool},  # see data/contamination.py
   "iterations": int, "seed": int, "compile_seconds": float, "peak_memory_gib": float,
   "seconds": {stage: float},
   "versions": {package: str}}
where every part may be missing; the bounds are those of 95 % intervals (statistics.Interval).

`python -m r3jax.report.page WORKDIR` prints what the summary.json of a run says.
"""

import base64
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
import dataclasses
import hashlib
import importlib.resources
import json
import re
import sys

from etils import epath
import markupsafe
import numpy as np

from r3jax.data import contamination
from r3jax.files import jsonl
from r3jax.model import preprocess
from r3jax.report import charts as charts_lib
from r3jax.report import pages
from r3jax.rewards import outcome

_WRITERS = 8  # images that are encoded and written at a time
# needs no quoting in an address
_IMAGE_PATH = re.compile(r"[\w-]+(/[\w-]+)*\.png", re.ASCII)
_VERDICTS = ("", "better", "worse")
NOTHING = "-"  # in a table, where there is no number

Cell = str | tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Table:
  """A table of a page.

  Attributes:
    caption: what it shows.
    columns: headings, that of the names first.
    rows: (name, cells). A cell is a text or (text, "better", "worse" or ""); what a text has in
      square brackets stands back behind the rest.
  """

  caption: str
  columns: Sequence[str]
  rows: Sequence[tuple[str, Sequence[Cell]]]

  def __post_init__(self):
    for name, cells in self.rows:
      if len(cells) + 1 != len(self.columns):
        raise ValueError(
          f"{self.caption!r} has {len(self.columns)} columns, but {len(cells)} cells beside {name!r}"
        )
      for _, verdict in map(_pair, cells):
        if verdict not in _VERDICTS:
          raise ValueError(
            f"the verdict on {name!r} must be one of {_VERDICTS}, got {verdict!r}"
          )


@dataclasses.dataclass(frozen=True)
class Page:
  """What a page shows, from top to bottom.

  Attributes:
    title: the heading.
    notes: what the reader must know before any number, such as that test prompts were trained on.
    tables: numbers.
    charts: curves.
    samples: the gallery, see the module's docstring.
  """

  title: str
  notes: Sequence[str] = ()
  tables: Sequence[Table] = ()
  charts: Sequence[charts_lib.Chart] = ()
  samples: Sequence[dict] = ()


def append_samples(
  folder: epath.PathLike,
  samples: Sequence[dict],
  images: Mapping[str, np.ndarray],
) -> None:
  """Adds samples to folder/samples.jsonl, from which the page is made after any restart.

  The lines are written when all the images are, so that no line names an image that is not there.

  Args:
    folder: the page's.
    samples: see the module's docstring.
    images: uint8 [H, W, 3] by the paths that the samples name.

  Raises:
    ValueError: an image is missing or something else, or a path is not one of letters, digits, "_",
      "-" and "/" that ends in ".png".
  """
  folder = epath.Path(folder)
  missing = {
    turn["image"] for sample in samples for turn in sample["turns"]
  } - images.keys()
  if missing:
    raise ValueError(
      f"the samples name images that are not given: {sorted(missing)[:3]}"
    )
  for name in images:
    if not _IMAGE_PATH.fullmatch(name):
      raise ValueError(
        f"an image's path must match {_IMAGE_PATH.pattern}, got {name!r}"
      )
  for parent in {(folder / name).parent for name in images} | {folder}:
    parent.mkdir(parents=True, exist_ok=True)
  write = lambda name: (folder / name).write_bytes(preprocess.png(images[name]))
  with futures.ThreadPoolExecutor(_WRITERS) as pool:
    list(pool.map(write, images))
  jsonl.append(folder / "samples.jsonl", samples)


def drop_samples_after(folder: epath.PathLike, step: int | None) -> None:
  """Drops the samples of steps that a resumed run repeats: later than `step`, or all if None.

  Their images stay until the run writes them anew.
  """
  jsonl.drop_after(epath.Path(folder) / "samples.jsonl", step)


def read_samples(folder: epath.PathLike) -> list[dict]:
  """Returns the samples of folder/samples.jsonl in the order of their steps."""
  return jsonl.read(epath.Path(folder) / "samples.jsonl")


def write_page(folder: epath.PathLike, page: Page) -> epath.Path:
  """Writes folder/index.html; returns its path.

  Raises:
    ValueError: a sample holds NaN or an infinity, which JSON does not have.
  """
  drawings = [
    drawing for drawing in map(charts_lib.layout, page.charts) if drawing
  ]
  style, script = _asset("report.css"), _asset("report.js")
  data = {
    "samples": list(page.samples),
    "charts": [_readings(drawing) for drawing in drawings],
  }
  text = pages.template("report.html.j2", {"pair": _pair}).render(
    page=page,
    drawings=drawings,
    plot=charts_lib,
    data=_embedded(data),
    steps=_distinct(page.samples, "step")[::-1],
    tags=_distinct(page.samples, "tag"),
    turns=_turn_labels(page.samples),
    style=style,
    script=script,
    style_hash=_csp_hash(style),
    script_hash=_csp_hash(script),
    boxes=any(
      turn.get("boxes") for sample in page.samples for turn in sample["turns"]
    ),
  )
  path = epath.Path(folder) / "index.html"
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  return path


def write_report(
  folder: epath.PathLike,
  summary: dict,
  metrics: Sequence[dict],
  samples: Sequence[dict],
  charts: Sequence[str] | None = None,
) -> epath.Path:
  """Writes the page of a run, folder/index.html; see `run_page`. Returns its path."""
  return write_page(folder, run_page(summary, metrics, samples, charts))


def run_page(
  summary: dict,
  metrics: Sequence[dict],
  samples: Sequence[dict],
  charts: Sequence[str] | None = None,
) -> Page:
  """Returns the page of a run.

  Args:
    summary: see the module's docstring.
    metrics: the objects of metrics.jsonl.
    samples: what the gallery shows; `read_samples(folder)` for a whole run.
    charts: names of the metrics to draw, in order; all if None.
  """
  if charts is None:
    charts = sorted({name for row in metrics for name in row} - {"step"})
  curve = lambda name: [
    (row["step"], row[name], None, None) for row in metrics if name in row
  ]
  drawn = [
    charts_lib.Chart(name, [charts_lib.Series(name, curve(name))])
    for name in charts
  ]
  tables = [table for table in _tables(summary) if table.rows]
  return Page(
    summary.get("title", "r3jax run"),
    list(_notes(summary)),
    tables,
    drawn,
    samples,
  )


def summary_lines(summary: dict) -> list[str]:
  """Returns a line for everything to know first, and for every score: before, after, difference with its interval."""
  lines = list(_notes(summary))
  for name, score in summary.get("scores", {}).items():
    mean, low, high = score["difference"]
    said = _verdict(name, score["difference"]) or "no clear change"
    lines.append(
      f"{name}: {score['before'][0]:.3f} -> {score['after'][0]:.3f}  "
      f"({mean:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}: {said})"
    )
  return lines


def _tables(summary: dict) -> Iterator[Table]:
  """Yields the tables of a run's page; those of which the summary says nothing have no rows."""
  yield Table(
    "Scores: mean and 95 % interval",
    ("score", "before", "after", "difference"),
    [
      (
        name,
        (
          with_interval(score["before"]),
          with_interval(score["after"]),
          change(name, score["difference"]),
        ),
      )
      for name, score in summary.get("scores", {}).items()
    ],
  )
  refined = summary.get("last round minus draft", {})
  yield Table(
    "Last round minus draft: mean and 95 % interval",
    ("model", "change"),
    [
      (when, (change("score", interval),))
      for when, interval in refined.items()
      if interval
    ],
  )
  behaviour = summary.get("behaviour", {"before": {}, "after": {}})
  yield Table(
    "How the model edits and stops",
    ("share of rounds", "before", "after"),
    [
      (
        name.replace("_", " "),
        tuple(share(behaviour[when][name]) for when in ("before", "after")),
      )
      for name in behaviour["before"]
    ],
  )
  yield Table(
    "Seconds",
    ("stage", "seconds"),
    [
      (stage, (f"{value:.2f}",))
      for stage, value in summary.get("seconds", {}).items()
    ],
  )
  facts = (
    ("iterations", "{}"),
    ("seed", "{}"),
    ("peak_memory_gib", "{:.2f} GiB"),
  )
  yield Table(
    "Run",
    ("", "value"),
    [
      *(
        (
          name.removesuffix("_gib").replace("_", " "),
          (form.format(summary[name]),),
        )
        for name, form in facts
        if name in summary
      ),
      *(
        (package, (version,))
        for package, version in summary.get("versions", {}).items()
      ),
    ],
  )


def _notes(summary: dict) -> Iterator[str]:
  """Yields what a reader must know of a run before its numbers."""
  yield from contamination.Leaked(
    **summary.get("leaked", {"tags": {}, "complete": True})
  ).notes()
  missing = summary.get("images without a score", {})
  if any(missing.values()):
    said = ", ".join(f"{part:.1%} {when}" for when, part in missing.items())
    yield f"Some images have no score and count in no mean: {said}."


def share(value: float | None) -> str:
  """Writes a number in [0, 1]."""
  return NOTHING if value is None else f"{value:.3f}"


def with_interval(interval: Sequence[float] | None) -> str:
  """Writes [mean, low, high]."""
  return "{:.3f} [{:.3f}, {:.3f}]".format(*interval) if interval else NOTHING


def change(name: str, interval: Sequence[float] | None) -> Cell:
  """Writes the mean and interval of a difference, and says whether it is clearly better or worse; see `_verdict`."""
  return (
    ("{:+.3f} [{:+.3f}, {:+.3f}]".format(*interval), _verdict(name, interval))
    if interval
    else NOTHING
  )


def _verdict(name: str, interval: Sequence[float]) -> str:
  """Returns what the interval of a difference says: nothing where it holds 0.

  Args:
    name: of what differs; behind its last comma may stand a part of the score.
    interval: [mean, low, high].
  """
  _, low, high = interval
  if low <= 0 <= high:
    return ""
  return (
    "better"
    if (low > 0) != (name.rpartition(", ")[2] in outcome.LOWER_IS_BETTER)
    else "worse"
  )


def _pair(cell: Cell) -> tuple[str, str]:
  """Returns (text, verdict) of a cell."""
  return (cell, "") if isinstance(cell, str) else cell


def _distinct(samples: Sequence[dict], name: str) -> list:
  return sorted({sample[name] for sample in samples})


def _turn_labels(samples: Sequence[dict]) -> list[str]:
  """Returns the labels of the turns of the sample that has the most; the first such sample's."""
  turns = max((sample["turns"] for sample in samples), key=len, default=[])
  return [
    turn.get("label") or (f"round {i + 1}" if i else "draft")
    for i, turn in enumerate(turns)
  ]


def _readings(drawing: charts_lib.Drawing) -> dict:
  """Returns what the script needs to read a chart's values off it."""
  series = [
    {"label": curve.label, "points": curve.points} for curve in drawing.curves
  ]
  return {"x_label": drawing.x_label, "reach": drawing.reach, "series": series}


def _embedded(data: dict) -> markupsafe.Markup:
  """Returns JSON that stands in a script element as it is: nothing in it can end the element.

  It is ASCII, so the line separators U+2028 and U+2029 are escaped too, and halves of surrogate
  pairs, which UTF-8 cannot hold.
  """
  text = json.dumps(
    data, allow_nan=False, ensure_ascii=True, separators=(",", ":")
  )
  return markupsafe.Markup(
    text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
  )


def _asset(name: str) -> markupsafe.Markup:
  """Returns a file of this folder, to stand in the page as it is."""
  return markupsafe.Markup(
    (importlib.resources.files("r3jax.report") / name).read_text(
      encoding="utf-8"
    )
  )


def _csp_hash(text: str) -> str:
  """Returns the source expression that allows exactly this inline style or script."""
  return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


if __name__ == "__main__":
  workdir = epath.Path(sys.argv[1])
  print(f"report: {workdir / 'report' / 'index.html'}")
  print(
    "\n".join(summary_lines(json.loads((workdir / "summary.json").read_text())))
  )

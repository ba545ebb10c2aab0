"""Renders one static HTML page: notes, tables, curves and a gallery of samples.

The page is folder/index.html. Its styles, script and data are inside; its images are files beside
it. It loads nothing else, so that it can be read from a disk, a bucket or a web server.
"""

from collections.abc import Sequence
import dataclasses
import json

from etils import epath
import markupsafe

from r3jax.evaluation import estimates
from r3jax.evaluation import sample_log
from r3jax.report import charts as charts_lib
from r3jax.report import tables as tables_lib
from r3jax.report import templates


@dataclasses.dataclass(frozen=True)
class Page:
  """Content of a page, from top to bottom.

  Attributes:
    title: Heading.
    notes: What the reader must know before any number, such as that test prompts were trained on.
    tables: Numbers.
    charts: Curves.
    samples: Samples of the gallery; their images are in the folder of the page.
  """

  title: str
  notes: Sequence[str] = ()
  tables: Sequence[tables_lib.Table] = ()
  charts: Sequence[charts_lib.Chart] = ()
  samples: Sequence[sample_log.Sample] = ()


def write_page(folder: epath.PathLike, page: Page) -> epath.Path:
  """Writes folder/index.html; returns its path.

  Raises:
    ValueError: A sample holds NaN or an infinity, which JSON does not have.
  """
  drawings = []
  for chart in page.charts:
    drawing = charts_lib.layout(chart)
    if drawing:
      drawings.append(drawing)
  style = templates.asset("report.css")
  script = templates.asset("report.js")
  data = {
    "samples": [sample.to_json() for sample in page.samples],
    "charts": [_chart_values(drawing) for drawing in drawings],
  }
  steps = set()
  tags = set()
  has_boxes = False
  for sample in page.samples:
    steps.add(sample.step)
    tags.add(sample.tag)
    has_boxes |= any(turn.boxes for turn in sample.turns)

  template = templates.load("report.html.j2")
  text = template.render(
    page=page,
    drawings=drawings,
    plot=charts_lib,
    format_cell=tables_lib.format_cell,
    data=_as_script_data(data),
    steps=sorted(steps, reverse=True),
    tags=sorted(tags),
    turns=_turn_labels(page.samples),
    has_boxes=has_boxes,
    style=style,
    script=script,
    style_hash=templates.csp_hash(style),
    script_hash=templates.csp_hash(script),
  )
  path = epath.Path(folder) / "index.html"
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  return path


def _turn_labels(samples: Sequence[sample_log.Sample]) -> list[str]:
  """Returns the labels of the turns of the first sample that has the most turns."""
  if not samples:
    return []
  longest = max(samples, key=lambda sample: len(sample.turns))
  return [
    turn.label or estimates.round_name(i)
    for i, turn in enumerate(longest.turns)
  ]


def _chart_values(drawing: charts_lib.Drawing) -> dict:
  """Returns the values of a chart that the script shows under the pointer."""
  series = [
    {"label": curve.label, "points": curve.points} for curve in drawing.curves
  ]
  return {
    "x_label": drawing.x_label,
    "reach": drawing.x_range,
    "series": series,
  }


def _as_script_data(data: dict) -> markupsafe.Markup:
  """Returns JSON that can stand in a script element: nothing in it ends the element.

  It is ASCII, so that the line separators U+2028 and U+2029 are escaped too, and halves of
  surrogate pairs, which UTF-8 cannot hold.
  """
  text = json.dumps(
    data, allow_nan=False, ensure_ascii=True, separators=(",", ":")
  )
  for character in "<>&":
    text = text.replace(character, f"\\u{ord(character):04x}")
  return markupsafe.Markup(text)

"""Renders one static HTML page: headline, curves, a gallery of samples, tables and facts.

The page is folder/index.html. Its styles, script and data are inside; its images are files beside
it. It loads nothing else, so that it can be read from a disk, a bucket or a web server.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json

from etils import epath
import markupsafe

from r3jax.evaluation import estimates
from r3jax.evaluation import sample_log
from r3jax.files import atomic
from r3jax.report import charts as charts_lib
from r3jax.report import forest as forest_lib
from r3jax.report import tables as tables_lib
from r3jax.report import templates


@dataclasses.dataclass(frozen=True)
class Tile:
  """A number of the headline.

  Attributes:
    name: What it is.
    before: Its value before, "" where there is one value only.
    value: Its value.
    change: How it differs from `before`, with the interval; "" if that is not known.
    verdict: "better", "worse" or "".
    remark: What the number rests on, such as the number of prompts.
  """

  name: str
  before: str
  value: str
  change: str = ""
  verdict: str = ""
  remark: str = ""


@dataclasses.dataclass(frozen=True)
class Link:
  """A link to another page of the same run.

  Attributes:
    target: Relative path.
    text: What stands there.
  """

  target: str
  text: str


@dataclasses.dataclass(frozen=True)
class Page:
  """Content of a page, from top to bottom.

  Attributes:
    title: Heading.
    state: How far a run is and when the page was written; "" of what is finished.
    notes: What the reader must know before any number, such as that test prompts were trained on.
    tiles: Numbers of the headline.
    lead: Main chart; None has none.
    forest: Scores by tag, before and after.
    links: Other pages of the run.
    tables: Numbers.
    charts: Curves.
    groups: Further curves by the question that they answer.
    samples: Samples of the gallery; their images are in the folder of the page.
    facts: How the page came to be: command, machine, ...
    config: Values of the config by their dotted keys.
  """

  title: str
  notes: Sequence[str] = ()
  tables: Sequence[tables_lib.Table] = ()
  charts: Sequence[charts_lib.Chart] = ()
  samples: Sequence[sample_log.Sample] = ()
  state: str = ""
  tiles: Sequence[Tile] = ()
  lead: charts_lib.Chart | None = None
  forest: Sequence[forest_lib.Row] = ()
  links: Sequence[Link] = ()
  groups: Mapping[str, Sequence[charts_lib.Chart]] = dataclasses.field(
    default_factory=dict
  )
  facts: Mapping[str, str] = dataclasses.field(default_factory=dict)
  config: Mapping[str, str] = dataclasses.field(default_factory=dict)


def write_page(folder: epath.PathLike, page: Page) -> epath.Path:
  """Writes folder/index.html; returns its path.

  Raises:
    ValueError: A sample holds NaN or an infinity, which JSON does not have.
  """
  lead = charts_lib.layout(page.lead) if page.lead else None
  drawings = _drawn(page.charts)
  groups = {}
  for question, charts in page.groups.items():
    drawn = _drawn(charts)
    if drawn:
      groups[question] = drawn
  # In the order of the page, by which the script finds them.
  all_drawings = [lead] if lead else []
  all_drawings += drawings
  for drawn in groups.values():
    all_drawings += drawn
  style = templates.asset("report.css")
  script = templates.asset("report.js")
  data = {
    "samples": [sample.to_json() for sample in page.samples],
    "charts": [_chart_values(drawing) for drawing in all_drawings],
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
    lead=lead,
    drawings=drawings,
    groups=groups,
    forest=forest_lib.layout(page.forest),
    forest_width=forest_lib.WIDTH,
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
  # Readers of a run that goes on see the page before or this one, never a part.
  atomic.write_text(path, text)
  return path


def _drawn(
  charts: Sequence[charts_lib.Chart],
) -> list[charts_lib.Drawing]:
  """Returns the drawings of the charts that have a value."""
  drawings = [charts_lib.layout(chart) for chart in charts]
  return [drawing for drawing in drawings if drawing]


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
    {"label": curve.label, "points": curve.points} for curve in drawing.named
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

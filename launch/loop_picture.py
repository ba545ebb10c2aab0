r"""Draws the picture of the loop on README's first screen from a sample of an evaluation.

  r3jax evaluate --config=r3_geneval:shapes --workdir=evaluations/shipped
  python launch/loop_picture.py evaluations/shipped [--sample=KEY] [--out=docs/loop.svg]

The first command evaluates the shipped model; the workdir of a run will do as well, whose first
evaluation is taken. Without --sample it is the first chain whose draft is wrong, whose first edit
makes it right, and which then ends.
"""

import base64
import pathlib
import sys
import textwrap
from xml.etree import ElementTree

from absl import app
from absl import flags
from etils import epath
import numpy as np

from r3jax.evaluation import finished
from r3jax.evaluation import sample_log
from r3jax.files import image_files
from r3jax.model import preprocess

_SAMPLE = flags.DEFINE_string("sample", "", "Key of the sample to draw.")
_ROOT = pathlib.Path(__file__).parents[1]
_OUT = flags.DEFINE_string("out", str(_ROOT / "docs" / "loop.svg"), "SVG file.")

# Sizes in the units of the picture, which are pixels where it is shown at its full width.
_MARGIN = 24
_GAP = 36  # between panels; holds an arrow
_IMAGE_WIDTH = 192
_PANEL_TOP = 84
_LINE = 19
_LETTERS = 23  # of a line of text, also in fonts that run wide
_NOTE_LETTERS = 120
_NUM_PANELS = 4

# An opaque card of its own, so that it is legible on any page; dark where the reader's system is.
_STYLE = """
text { font-family: "DejaVu Sans", Verdana, Helvetica, Arial, sans-serif; font-size: 14px;
  fill: #1c2024 }
.card { fill: #fbfbf9; stroke: #c9ccd1 }
.note { fill: #f0f2f5; stroke: #c9ccd1 }
.frame { fill: none; stroke: #c9ccd1 }
.title { font-weight: bold; font-size: 15px }
.faint { fill: #5a6169; font-size: 13px }
.wrong { fill: #b3261e; font-weight: bold }
.right { fill: #1a6b3c; font-weight: bold }
.arrow { stroke: #5a6169; stroke-width: 2.5; fill: none }
.head { fill: #5a6169 }
image { image-rendering: pixelated }
@media (prefers-color-scheme: dark) {
  text { fill: #e8eaed }
  .card { fill: #1b1f24; stroke: #454b53 }
  .note { fill: #262b32; stroke: #454b53 }
  .frame { stroke: #454b53 }
  .faint { fill: #a9b1ba }
  .wrong { fill: #ff8f85 }
  .right { fill: #7fd6a1 }
  .arrow { stroke: #a9b1ba }
  .head { fill: #a9b1ba }
}
"""


class Picture:
  """An SVG picture that grows by shapes."""

  def __init__(self, width: int, height: int, label: str):
    """Starts with an empty card; the label is what a screen reader says."""
    size = {"width": str(width), "height": str(height)}
    self.root = ElementTree.Element(
      "svg",
      {
        "xmlns": "http://www.w3.org/2000/svg",
        "viewBox": f"0 0 {width} {height}",
        "role": "img",
        "aria-label": label,
        **size,
      },
    )
    ElementTree.SubElement(self.root, "style").text = _STYLE
    self.rectangle("card", (0.5, 0.5), (width - 1, height - 1))

  def rectangle(
    self, kind: str, corner: tuple[float, float], size: tuple[float, float]
  ) -> None:
    """Draws a rectangle with round corners; corner is (x, y), size (width, height)."""
    numbers = zip(("x", "y", "width", "height"), (*corner, *size), strict=True)
    attributes = {name: f"{number:g}" for name, number in numbers}
    attributes |= {"class": kind, "rx": "0" if kind == "frame" else "8"}
    ElementTree.SubElement(self.root, "rect", attributes)

  def text(
    self, kind: str, x: float, y: float, content: str, letters: int = _LETTERS
  ) -> float:
    """Writes text in lines of so many letters; returns where the next line begins."""
    for line in textwrap.wrap(content, letters, break_on_hyphens=False):
      place = {"class": kind, "x": f"{x:g}", "y": f"{y:g}"}
      ElementTree.SubElement(self.root, "text", place).text = line
      y += _LINE
    return y

  def image(self, x: float, y: float, pixels: np.ndarray) -> None:
    """Shows uint8 [H, W, 3] enlarged without smoothing."""
    factor = _IMAGE_WIDTH // pixels.shape[1]
    # Enlarged here too: not every viewer heeds `image-rendering`.
    enlarged = pixels.repeat(factor, axis=0).repeat(factor, axis=1)
    content = base64.b64encode(preprocess.png(enlarged)).decode()
    height = _IMAGE_WIDTH * pixels.shape[0] / pixels.shape[1]
    attributes = {
      "x": f"{x:g}",
      "y": f"{y:g}",
      "width": str(_IMAGE_WIDTH),
      "height": f"{height:g}",
      "href": f"data:image/png;base64,{content}",
    }
    ElementTree.SubElement(self.root, "image", attributes)
    self.rectangle("frame", (x, y), (_IMAGE_WIDTH, height))

  def arrow(self, x: float, y: float) -> None:
    """Draws an arrow to the right into the gap that begins at x."""
    end = x + _GAP - 14
    line = {"class": "arrow", "d": f"M{x + 5:g} {y:g}H{end:g}"}
    head = {"class": "head", "d": f"M{end:g} {y - 6:g}l10 6l-10 6z"}
    ElementTree.SubElement(self.root, "path", line)
    ElementTree.SubElement(self.root, "path", head)


def _thought(text: str) -> str:
  """Returns what a model thinks, without the tags around it."""
  thought = text.partition("<think>")[2].partition("</think>")[0]
  return thought.strip().replace(" ,", ",").replace(" :", ":")


def _is_fixed_at_once(sample: sample_log.Sample) -> bool:
  """Returns whether a wrong draft is made right by the first edit, and the chain then ends."""
  if len(sample.turns) < 3:
    return False
  draft, edited, last = sample.turns[:3]
  return draft.score != 1 and edited.score == 1 and last.stop


def choose(
  samples: list[sample_log.Sample], key: str
) -> tuple[sample_log.Sample, str]:
  """Returns the sample to draw, and a sentence that says how usual it is.

  Raises:
    ValueError: there is none.
  """
  fixed = [sample for sample in samples if _is_fixed_at_once(sample)]
  wrong = [sample for sample in samples if sample.turns[0].score != 1]
  wanted = [sample for sample in fixed if key in ("", sample.key)]
  if not wanted:
    keys = ", ".join(sample.key for sample in fixed) or "none"
    raise ValueError(
      "the sample must be one whose wrong draft is made right by the first edit, after which the "
      f"chain ends; {key or 'there'} is not one of: {keys}"
    )
  note = (
    f"A sample of the shipped model. Of {len(samples)} held-out prompts, {len(wrong)} drafts are "
    f"wrong, and {len(fixed)} of these are made right by one edit, after which the model stops."
  )
  return wanted[0], note


def draw(
  sample: sample_log.Sample,
  images: tuple[np.ndarray, np.ndarray],
  note: str,
) -> str:
  """Returns the SVG of a chain: draft, reflection, edited image, and the look that ends it.

  Args:
    sample: of three turns at least.
    images: the draft and the edited image, uint8 [H, W, 3].
    note: what stands below.
  """
  draft, edited, last = sample.turns[:3]
  width = _NUM_PANELS * _IMAGE_WIDTH + (_NUM_PANELS - 1) * _GAP + 2 * _MARGIN
  height = _PANEL_TOP + _IMAGE_WIDTH + 5 * _LINE + 36
  label = (
    f"Prompt: {sample.prompt}. The draft is wrong ({draft.reason}). The model writes: "
    f"{edited.instruction}. The edited image is right."
  )
  picture = Picture(width, height, label)
  picture.text("title", _MARGIN, 32, f"Prompt: {sample.prompt}", letters=90)
  columns = []
  for number in range(_NUM_PANELS):
    columns.append(_MARGIN + number * (_IMAGE_WIDTH + _GAP))
  titles = ("1 think and draft", "2 look and reflect", "3 edit", "4 look again")
  for x, title in zip(columns, titles, strict=True):
    picture.text("title", x, 70, title)
  middle = _PANEL_TOP + _IMAGE_WIDTH / 2
  for x in columns[:-1]:
    picture.arrow(x + _IMAGE_WIDTH, middle)
  below = _PANEL_TOP + _IMAGE_WIDTH + 24

  picture.image(columns[0], _PANEL_TOP, images[0])
  y = picture.text("wrong", columns[0], below, draft.reason or "wrong")
  picture.text("faint", columns[0], y, f"thought: {_thought(draft.text)}")
  picture.image(columns[2], _PANEL_TOP, images[1])
  picture.text("right", columns[2], below, "right")

  for x, turn in ((columns[1], edited), (columns[3], last)):
    size = (_IMAGE_WIDTH, _IMAGE_WIDTH)
    picture.rectangle("note", (x, _PANEL_TOP), size)
    y = picture.text("faint", x + 12, _PANEL_TOP + 26, "thought", 20)
    y = picture.text("", x + 12, y, _thought(turn.text), 20)
    y = picture.text("faint", x + 12, y + 10, "instruction", 20)
    picture.text("title", x + 12, y, turn.instruction, 18)
  picture.text("faint", _MARGIN, height - 34, note, _NOTE_LETTERS)
  ElementTree.indent(picture.root, space=" ")
  return ElementTree.tostring(picture.root, encoding="unicode") + "\n"


def main(argv: list[str]) -> None:
  """Reads the evaluation and writes the picture."""
  if len(argv) != 2:
    sys.exit("r3jax: loop_picture takes the folder of an evaluation")
  try:
    evaluation = finished.read(argv[1])[0]
    sample, note = choose(evaluation.samples, _SAMPLE.value)
    folder = epath.Path(argv[1])
    if evaluation.run != evaluation.name:  # of a run
      folder = next(iter(finished.step_folders(folder).values()))
    draft, edited = (
      image_files.read(folder / turn.image) for turn in sample.turns[:2]
    )
  except ValueError as error:
    sys.exit(f"r3jax: {error}")
  pathlib.Path(_OUT.value).write_text(draw(sample, (draft, edited), note))
  print(f"{_OUT.value}: {sample.key}, {sample.prompt!r}. {note}")


if __name__ == "__main__":
  app.run(main)

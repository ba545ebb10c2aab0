"""Images with a text in them, in the fonts that Matplotlib ships."""

import dataclasses
import pathlib
import random

import matplotlib
import numpy as np
from PIL import Image
from PIL import ImageDraw
from PIL import ImageFont

from r3jax.data import records
from r3jax.data.generators import ocr as generator

FONTS = (
  "DejaVuSans",
  "DejaVuSerif-Bold",
  "DejaVuSansMono",
  "STIXGeneral",
  "STIXGeneralBolIta",
)
_FOLDER = pathlib.Path(matplotlib.get_data_path()) / "fonts" / "ttf"
_SIZE = 512  # pixels of a side


@dataclasses.dataclass(frozen=True)
class Rendering:
  """A text that is drawn exactly.

  Attributes:
    prompt: what asks for it.
    font: one of FONTS.
    image: uint8 [512, 512, 3].
  """

  prompt: records.Prompt
  font: str
  image: np.ndarray


def render(number: int, seed: int = 0) -> list[Rendering]:
  """Returns the first prompts of OCR's test set, the fonts in turn.

  Sizes, places and colours are random; a text of several words has two lines every second time.
  """
  rng = random.Random(seed)
  renderings = []
  for place, prompt in enumerate(generator.heldout()[:number]):
    font = FONTS[place % len(FONTS)]
    # Tags take turns too, so that a tag would otherwise always have the same number of lines.
    in_two_lines = place // 4 % 2 == 1
    image = _draw(prompt.inscription, font, in_two_lines, rng)
    renderings.append(Rendering(prompt, font, image))
  return renderings


def _draw(
  inscription: str, font: str, in_two_lines: bool, rng: random.Random
) -> np.ndarray:
  text = inscription
  words = inscription.split()
  if in_two_lines and len(words) > 1:
    half = len(words) // 2
    text = " ".join(words[:half]) + "\n" + " ".join(words[half:])
  paper = tuple(rng.randint(170, 255) for _ in range(3))
  ink = tuple(rng.randint(0, 90) for _ in range(3))
  if rng.random() < 0.5:
    paper, ink = ink, paper
  picture = Image.new("RGB", (_SIZE, _SIZE), paper)
  draw = ImageDraw.Draw(picture)
  width = rng.uniform(0.4, 0.85) * _SIZE
  # Widths grow in proportion to the size.
  probe = ImageFont.truetype(_FOLDER / f"{font}.ttf", 100)
  size = 100 * width / draw.multiline_textbbox((0, 0), text, probe)[2]
  final = ImageFont.truetype(_FOLDER / f"{font}.ttf", int(min(size, 110)))
  box = draw.multiline_textbbox((0, 0), text, final)
  left = rng.uniform(0.04, 0.96) * (_SIZE - box[2])
  top = rng.uniform(0.1, 0.9) * (_SIZE - box[3])
  draw.multiline_text((left, top), text, ink, final)
  return np.asarray(picture)

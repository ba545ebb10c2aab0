"""Measures the reward `ocr` with its real weights, and writes docs/howto/rewards_zoo.md's table.

  pip install -e ".[ocr]"
  python -m tests.rewards.ocr_figures [--images=100] [--write]

Texts of OCR's test set are drawn exactly in five fonts, on plain canvases of 512 x 512 pixels; each
is scored with its own prompt, and with another prompt of the same tag.
"""

import collections
from collections.abc import Mapping, Sequence
import dataclasses
import os
import pathlib
import resource
import sys
import time

from absl import app
from absl import flags
import numpy as np

from r3jax.data import inscriptions
from r3jax.data import records
from r3jax.report import seed_table
from r3jax.rewards import outcome
from r3jax.rewards.serving import geneval
from r3jax.rewards.serving import local
from r3jax.rewards.serving import ocr
from tests.rewards import rendered_texts

_IMAGES = flags.DEFINE_integer("images", 100, "Images that are read.", 20, 200)
_WRITE = flags.DEFINE_bool("write", False, "Writes the table into the docs.")

_PAGE = pathlib.Path(__file__).parents[2] / "docs/howto/rewards_zoo.md"
_BLOCK = "ocr"
_BATCH = 20  # images of a call


@dataclasses.dataclass(frozen=True)
class Figures:
  """What was measured.

  Attributes:
    right_by_font: scores of images with their own prompts, by font.
    wrong: scores of the same images with the prompts of others.
    cpu_seconds: of an image, over all threads.
  """

  right_by_font: Mapping[str, Sequence[float]]
  wrong: Sequence[float]
  cpu_seconds: float

  @property
  def right(self) -> list[float]:
    """Scores of all images with their own prompts."""
    return [score for scores in self.right_by_font.values() for score in scores]


def measure(reward: local.Ocr, num_images: int) -> Figures:
  """Scores rendered texts with their own prompts, and with others.

  Raises:
    ValueError: an image has no score.
  """
  renderings = rendered_texts.render(num_images)
  prompts = [rendering.prompt for rendering in renderings]
  start = time.process_time()
  outcomes = []
  for first in range(0, num_images, _BATCH):
    rows = slice(first, first + _BATCH)
    images = np.stack([rendering.image for rendering in renderings[rows]])
    outcomes += reward.score(images, prompts[rows])
  cpu_seconds = (time.process_time() - start) / num_images
  missing = [each for each in outcomes if not isinstance(each, outcome.Ok)]
  if missing:
    raise ValueError(f"every image must have a score; got {missing[0]}")

  right_by_font = collections.defaultdict(list)
  wrong = []
  for place, scored in enumerate(outcomes):
    right_by_font[renderings[place].font].append(scored.score)
    other = _other(prompts[place:] + prompts[:place])
    wrong.append(_rescored(scored, other.inscription))
  return Figures(right_by_font, wrong, cpu_seconds)


def _other(prompts: Sequence[records.Prompt]) -> records.Prompt:
  """Returns the first prompt of the tag of prompts[0] that asks for another text."""
  own = prompts[0]
  asked = inscriptions.comparable(own.inscription)
  return next(
    prompt
    for prompt in prompts
    if prompt.tag == own.tag
    and inscriptions.comparable(prompt.inscription) != asked
  )


def _rescored(scored: outcome.Ok, inscription: str) -> float:
  """Returns the score of what was read for another inscription."""
  box = ocr.TextBox(scored.detail["read"], 0, 0, 1, 1)
  return ocr.judge(inscription, [box]).score


def _num_readers() -> int:
  return min(os.cpu_count() or 1, local.MOST_READERS)


def _table(figures: Figures, identity: Mapping) -> str:
  lines = [
    "| texts | mean score | least | greatest |",
    "| --- | --- | --- | --- |",
  ]
  rows = dict(figures.right_by_font)
  rows["all fonts"] = figures.right
  rows["the text of another prompt"] = figures.wrong
  for name, scores in rows.items():
    lines.append(
      f"| {name} | {np.mean(scores):.3f} | {min(scores):.3f} | {max(scores):.3f} |"
    )
  memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
  lines += [
    "",
    f"{len(figures.right)} images of 512 x 512 pixels with {identity['model']}, written by "
    "`python -m tests.rewards.ocr_figures --write`: "
    f"{figures.cpu_seconds:.2f} CPU seconds an image "
    f"({1 / figures.cpu_seconds:.1f} images a second and core), "
    f"{memory:.0f} MiB of memory at most for a process that reads {_num_readers()} images at a "
    "time, JAX included.",
  ]
  return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
  """Prints the table; writes it into the docs if it may."""
  del argv
  try:
    reward = local.load("ocr", "", "", geneval.OFFICIAL)
  except ValueError as error:
    sys.exit(f"r3jax: {error}")
  figures = measure(reward, _IMAGES.value)
  table = _table(figures, reward.describe())
  print(table)
  if _WRITE.value:
    page = _PAGE.read_text()
    _PAGE.write_text(seed_table.replace_block(page, _BLOCK, table))


if __name__ == "__main__":
  app.run(main)

"""Keeps generated samples as files, and shows them on one page: a row per image, round by round.

A sample NAME is NAME.json beside NAME_0.png, NAME_1.png, ... The JSON file is written last, so that
a sample is there whole or not at all. The page refers to the images; it moves with its folder.
"""

from collections.abc import Sequence
import json
import re

from etils import epath
import numpy as np

from r3jax.files import atomic
from r3jax.model import preprocess
from r3jax.report import pages

_NAME = re.compile(r"\d+_\d+\.json")


def name_of(prompt: int, image: int) -> str:
  """Returns the name of a sample by the numbers of its prompt and image."""
  return f"{prompt:05d}_{image:02d}"


def write(
  folder: epath.PathLike, name: str, facts: dict, images: Sequence[np.ndarray]
) -> None:
  """Writes a sample.

  Args:
    folder: is there.
    name: see `name_of`.
    facts: JSON: "prompt", "prompt_number", "image_number", "size" of the images, and "turns", a list
      with an object per image, which gets the image's file name.
    images: uint8 [H, W, 3], one per turn.
  """
  folder, turns = epath.Path(folder), []
  for i, (turn, image) in enumerate(zip(facts["turns"], images, strict=True)):
    turns.append({"image": f"{name}_{i}.png", **turn})
    (folder / turns[-1]["image"]).write_bytes(preprocess.png(image))
  atomic.write_text(
    folder / f"{name}.json",
    json.dumps(facts | {"turns": turns}, indent=1, allow_nan=False) + "\n",
  )


def read_one(folder: epath.PathLike, name: str) -> dict | None:
  """Returns the facts of a sample, None where it has not been written."""
  path = epath.Path(folder) / f"{name}.json"
  return json.loads(path.read_text()) if path.is_file() else None


def read(folder: epath.PathLike) -> list[dict]:
  """Returns the facts of all samples of a folder, by the numbers of prompt and image."""
  names = [
    path.stem
    for path in epath.Path(folder).iterdir()
    if _NAME.fullmatch(path.name)
  ]
  samples = [read_one(folder, name) for name in names]
  return sorted(
    samples,
    key=lambda sample: (sample["prompt_number"], sample["image_number"]),
  )


def write_page(folder: epath.PathLike, title: str) -> epath.Path:
  """Writes folder/index.html of all samples there; returns its path."""
  prompts: dict[str, list[dict]] = {}
  for sample in read(folder):
    prompts.setdefault(sample["prompt"], []).append(sample)
  path = epath.Path(folder) / "index.html"
  path.write_text(
    pages.template("gallery.html.j2").render(title=title, prompts=prompts)
  )
  return path

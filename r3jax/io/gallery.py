"""Keeps generated samples as files, and shows them on one page: a row per image, round by round.

A sample NAME is NAME.json beside NAME_0.png, NAME_1.png, ... The JSON file is written last, so that
a sample is there whole or not at all. The page refers to the images; it moves with its folder.
"""

from collections.abc import Sequence
import json

from etils import epath
import jinja2
import numpy as np

from r3jax.io import images as images_lib


def name_of(prompt: int, image: int) -> str:
  """Returns the name of a sample by the numbers of its prompt and image."""
  return f"{prompt:05d}_{image:02d}"


def write(folder: epath.PathLike, name: str, facts: dict, images: Sequence[np.ndarray]) -> None:
  """Writes a sample.

  Args:
    folder: is there.
    name: see `name_of`.
    facts: JSON; "turns" is a list with an object per image, which gets the image's file name.
    images: uint8 [H, W, 3], one per turn.
  """
  folder, turns = epath.Path(folder), []
  for i, (turn, image) in enumerate(zip(facts["turns"], images, strict=True)):
    turns.append({"image": f"{name}_{i}.png", **turn})
    (folder / turns[-1]["image"]).write_bytes(images_lib.png(image))
  partial = folder / f"{name}.json.new"
  partial.write_text(json.dumps(facts | {"turns": turns}, indent=1, allow_nan=False) + "\n")
  partial.replace(folder / f"{name}.json")


def is_there(folder: epath.PathLike, name: str) -> bool:
  """Tells whether a sample has been written."""
  return (epath.Path(folder) / f"{name}.json").is_file()


def read(folder: epath.PathLike) -> list[dict]:
  """Returns the facts of all samples of a folder, by name."""
  paths = sorted(epath.Path(folder).glob("[0-9]*_[0-9]*.json"))
  return [json.loads(path.read_text()) | {"name": path.stem} for path in paths]


def write_page(folder: epath.PathLike, title: str) -> epath.Path:
  """Writes folder/index.html of all samples there; returns its path."""
  environment = jinja2.Environment(
      loader=jinja2.PackageLoader("r3jax", "io"), autoescape=True, trim_blocks=True,
      lstrip_blocks=True, undefined=jinja2.StrictUndefined)
  prompts: dict[str, list[dict]] = {}
  for sample in read(folder):
    prompts.setdefault(sample["prompt"], []).append(sample)
  path = epath.Path(folder) / "index.html"
  path.write_text(environment.get_template("gallery.html.j2").render(title=title, prompts=prompts))
  return path

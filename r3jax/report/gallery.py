"""Stores generated samples as files, and shows them on one page: a row per image, round by round.

A sample NAME is NAME.json beside NAME_0.png, NAME_1.png, ... The JSON file is written last, so that
a sample is there whole or not at all. The page refers to the images by relative paths, so that the
folder can be moved.
"""

from collections.abc import Sequence
import dataclasses
import json
import re

from absl import logging
from etils import epath
import numpy as np

from r3jax.evaluation import evaluate
from r3jax.evaluation import sample_log
from r3jax.files import atomic
from r3jax.files import damage
from r3jax.model import preprocess
from r3jax.report import templates

_NAME = re.compile(r"\d+_\d+\.json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratedTurn(sample_log.Turn):
  """A turn of a generated sample.

  Attributes:
    seconds: Time of the round for all images that were drawn together, compilation included.
  """

  seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratedSample:
  """A generated chain of images.

  Attributes:
    prompt: Text of the prompt.
    prompt_number: Index of the prompt.
    image_number: Index of the sample among those of its prompt.
    seed: Seed of all randomness.
    model: Folder of the model.
    size: Height and width of the images.
    turns: Images in order.
  """

  prompt: str
  prompt_number: int
  image_number: int
  seed: int
  model: str
  size: tuple[int, int]
  turns: Sequence[GeneratedTurn]

  @property
  def name(self) -> str:
    """Name of its files."""
    return evaluate.key_of(self.prompt_number, self.image_number)

  def to_json(self) -> dict:
    """Returns the JSON values of its file."""
    return vars(self) | {"turns": [turn.to_json() for turn in self.turns]}

  @classmethod
  def from_json(cls, values: dict) -> "GeneratedSample":
    """Returns the sample that `to_json` has written."""
    turns = tuple(GeneratedTurn(**turn) for turn in values["turns"])
    return cls(**{**values, "turns": turns})


def write(
  folder: epath.PathLike, sample: GeneratedSample, images: Sequence[np.ndarray]
) -> None:
  """Writes a sample.

  Args:
    folder: Existing folder.
    sample: Sample; the paths of its images are set here.
    images: uint8 [H, W, 3], one per turn.
  """
  folder = epath.Path(folder)
  turns = []
  for i, (turn, image) in enumerate(zip(sample.turns, images, strict=True)):
    path = f"{sample.name}_{i}.png"
    (folder / path).write_bytes(preprocess.png(image))
    turns.append(dataclasses.replace(turn, image=path))
  sample = dataclasses.replace(sample, turns=tuple(turns))
  text = json.dumps(sample.to_json(), indent=1, allow_nan=False)
  atomic.write_text(folder / f"{sample.name}.json", text + "\n")


def read_one(
  folder: epath.PathLike, prompt_number: int, image_number: int
) -> GeneratedSample | None:
  """Returns a sample of a folder, None if it has not been written, or is damaged.

  Raises:
    ValueError: What lies in its place is no file.
  """
  name = evaluate.key_of(prompt_number, image_number)
  path = epath.Path(folder) / f"{name}.json"
  damage.check_kinds([path], [])
  return _read_file(path) if path.exists() else None


def read(folder: epath.PathLike) -> list[GeneratedSample]:
  """Returns all samples of a folder, by the indices of prompt and image; none that are damaged."""
  samples = []
  for path in epath.Path(folder).iterdir():
    sample = _read_file(path) if _NAME.fullmatch(path.name) else None
    if sample is not None:
      samples.append(sample)
  return sorted(samples, key=lambda x: (x.prompt_number, x.image_number))


def _read_file(path: epath.Path) -> GeneratedSample | None:
  """Returns the sample of a file; None, with a warning, where it is damaged."""
  try:
    with damage.explained(path, "a generated sample", "It is left out"):
      return GeneratedSample.from_json(damage.read_object(path))
  except ValueError as error:
    logging.warning("%s", error)
    return None


def write_page(folder: epath.PathLike, title: str) -> epath.Path:
  """Writes folder/index.html of all samples there; returns its path."""
  samples_by_prompt: dict[str, list[GeneratedSample]] = {}
  for sample in read(folder):
    samples_by_prompt.setdefault(sample.prompt, []).append(sample)
  template = templates.load("gallery.html.j2")
  path = epath.Path(folder) / "index.html"
  style = templates.asset("gallery.css")
  text = template.render(
    title=title,
    prompts=samples_by_prompt,
    style=style,
    style_hash=templates.csp_hash(style),
  )
  path.write_text(text)
  return path

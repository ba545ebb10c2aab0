"""Images with labels, about which every model is asked the same questions.

A file of them is JSON, an object a line:

  {"image": "cat.png", "prompt": "a photo of a cat", "matches": true, "tag": "single_object",
   "questions": [{"kind": "count", "question": "How many cats are there?", "answer": "one"}]}

`image` is a path relative to the file. `tag` and `questions` may be left out; an answer is one
word, in lower case.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import hashlib
import json
import re

from etils import epath
import numpy as np

from r3jax.data import records
from r3jax.files import bounded
from r3jax.files import image_files
from r3jax.files import paths
from r3jax.files import texts

_MOST_IMAGES = 100_000
_MOST_SHOWN = 60  # characters of a value in a message
_WORD = re.compile(r"[a-z0-9]+")
# Names of questions about the prompt itself, which every image is asked.
MATCH = "match"
JUDGEMENT = "judgement"


@dataclasses.dataclass(frozen=True)
class Question:
  """A question about an image.

  Attributes:
    kind: What it is about; answers are counted by it.
    text: The question.
    answer: Word that is the right answer, in lower case.
  """

  kind: str
  text: str
  answer: str


@dataclasses.dataclass(frozen=True)
class LabelledImage:
  """An image, and what is known of it.

  Attributes:
    name: Name that is unique among the images.
    pixels: uint8 [H, W, 3].
    prompt: Text that the image may match.
    matches: Whether it does.
    tag: Kind of the prompt.
    questions: Further questions about it.
  """

  name: str
  pixels: np.ndarray
  prompt: str
  matches: bool
  tag: str = records.UNTAGGED
  questions: tuple[Question, ...] = ()

  def labels(self) -> dict:
    """Returns everything but the pixels as JSON values, a line of a file."""
    values = dataclasses.asdict(self)
    del values["name"]
    del values["pixels"]
    values["questions"] = [
      {"kind": x.kind, "question": x.text, "answer": x.answer}
      for x in self.questions
    ]
    return {"image": self.name} | values


def from_labels(values: Mapping, pixels: np.ndarray) -> LabelledImage:
  """Returns the image of a line and its pixels; raises a ValueError for what is wrong with it."""
  _check_labels(values)
  questions = []
  for question in values.get("questions", []):
    questions.append(
      Question(question["kind"], question["question"], question["answer"])
    )
  return LabelledImage(
    name=values["image"],
    pixels=pixels,
    prompt=values["prompt"],
    matches=values["matches"],
    tag=values.get("tag", records.UNTAGGED),
    questions=tuple(questions),
  )


def _shown(value: object) -> str:
  """Returns the beginning of a value, for messages."""
  text = repr(value)
  return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _check_labels(values: Mapping) -> None:
  """Raises a ValueError where an object is no labels of an image."""
  for key in ("image", "prompt"):
    if not isinstance(values.get(key), str) or not values[key].strip():
      raise ValueError(f"{key} must be a text; got {_shown(values.get(key))}")
  if not isinstance(values.get("matches"), bool):
    raise ValueError(
      f"matches must be true or false; got {_shown(values.get('matches'))}"
    )
  if not isinstance(values.get("tag", ""), str):
    raise ValueError(f"tag must be a text; got {_shown(values['tag'])}")
  questions = values.get("questions", [])
  if not isinstance(questions, list):
    raise ValueError(f"questions must be a list; got {_shown(questions)}")
  for question in questions:
    _check_question(question)


def _check_question(values: object) -> None:
  """Raises a ValueError where a value is no question of a line."""
  if not isinstance(values, dict):
    raise ValueError(f"a question must be an object; got {_shown(values)}")
  for key in ("kind", "question", "answer"):
    if not isinstance(values.get(key), str) or not values[key].strip():
      raise ValueError(
        f"{key} of a question must be a text; got {_shown(values.get(key))}"
      )
  if not _WORD.fullmatch(values["answer"]):
    raise ValueError(
      "answer of a question must be one word of lower-case letters and digits; "
      f"got {_shown(values['answer'])}"
    )
  if values["kind"] in (MATCH, JUDGEMENT):
    raise ValueError(
      f"kind of a question must not be {values['kind']!r}, which every image is asked anyway"
    )


def read(source: str, size: tuple[int, int]) -> tuple[LabelledImage, ...]:
  """Reads a file of labelled images.

  Args:
    source: Path of the file, on a disk or in a bucket.
    size: Height and width that the images must have, in pixels.

  Raises:
    ValueError: The file or an image cannot be used; the message names the line.
  """
  path = paths.of_user(source)
  try:
    lines = texts.lines(bounded.read_bytes(path))
  except OSError as error:
    raise ValueError(f"{error}{paths.did_you_mean(source)}") from error
  images = []
  names = set()
  for number, line in enumerate(lines, start=1):
    if not line.strip():
      continue
    try:
      image = _read_line(line, path.parent, size)
      if image.name in names:
        raise ValueError(
          f"image must stand in one line; {_shown(image.name)} repeats"
        )
      if len(images) == _MOST_IMAGES:
        raise ValueError(f"there may be {_MOST_IMAGES} images at most")
    except ValueError as error:
      raise ValueError(f"{path}:{number}: {error}") from error
    names.add(image.name)
    images.append(image)
  if not images:
    raise ValueError(
      f"{path} must hold labelled images, a line each; it is empty"
    )
  return tuple(images)


def _read_line(
  line: bytes, folder: epath.Path, size: tuple[int, int]
) -> LabelledImage:
  """Returns the image of a line; raises a ValueError for what is wrong with it."""
  values = bounded.parse_json(line, bounded.MESSAGE_LIMITS)
  if not isinstance(values, dict):
    raise ValueError(f"a line must be a JSON object; got {line[:40]!r}")
  _check_labels(values)
  pixels = image_files.read(folder / values["image"])
  if pixels.shape[:2] != size:
    raise ValueError(
      f"images must have the size of the config, {size[0]} x {size[1]} (image.height x "
      f"image.width); {_shown(values['image'])} has {pixels.shape[0]} x {pixels.shape[1]}"
    )
  return from_labels(values, pixels)


def sha256(images: Iterable[LabelledImage]) -> str:
  """Returns the hash that identifies labelled images: their labels and pixels, in hex digits."""
  digest = hashlib.sha256()
  for image in images:
    digest.update(json.dumps(image.labels()).encode())
    digest.update(image.pixels.tobytes())
  return digest.hexdigest()

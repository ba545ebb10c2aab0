"""Stores samples: one line of samples.jsonl per chain of images, and one PNG file per image.

Evaluations write them into their folder, training writes those of its report. The report page shows
them, a summary is computed from them, and an interrupted evaluation continues from them.
"""

from collections.abc import Mapping, Sequence
from concurrent import futures
import dataclasses
import re
import types

from absl import logging
from etils import epath
import numpy as np

from r3jax.files import damage
from r3jax.files import jsonl
from r3jax.model import preprocess

_FILE = "samples.jsonl"
_WRITERS = 8  # images that are encoded and written at a time
# Such a path needs no quoting in an address.
_IMAGE_PATH = re.compile(r"[\w-]+(/[\w-]+)*\.png", re.ASCII)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn:
  """One image of a chain, and the text that led to it.

  Attributes:
    image: Path of the PNG file, relative to the folder of samples.jsonl. A turn that stops has the
      path of the turn before.
    score: Reward in [0, 1], 1 is right; None if it is missing.
    text: What the model wrote: its thought, and after the first turn its instruction.
    instruction: Edit that made the image, "" for a draft.
    stop: Whether the chain has finished in this turn or before, so that the image did not change.
    parts: Parts of the reward by name, in [0, 1]; None where one is missing.
    label: Name of the turn, if it is not "draft" or "round 2", "round 3", ...
    format: Format reward of the text, in [0, 1].
    tokens: Length of the text; 0 after the chain has finished.
    boxes: Objects that the verifier recognizes, {"label": str, "box": [y0, x0, y1, x1]}; the
      coordinates are shares of the image.
    reason: Why the score is not 1, in a few words; None where nothing says so.
  """

  image: str
  score: float | None
  text: str
  instruction: str
  stop: bool
  parts: Mapping[str, float | None] | None = None
  label: str | None = None
  format: float | None = None
  tokens: int | None = None
  boxes: Sequence[dict] | None = None
  reason: str | None = None

  def to_json(self) -> dict:
    """Returns the turn as JSON values; optional fields that are None are left out."""
    values = {}
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      # A required field may be None too: a missing score is null in the file.
      is_required = field.default is dataclasses.MISSING
      if is_required or value is not None:
        values[field.name] = value
    return values


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluatedTurn(Turn):
  """A turn of an evaluation.

  Attributes:
    chain_score: Score of the chain that ignores its stops; None if it is missing, and from the
      stop on where chains end with it.
    says_stop: Whether this turn's text says "no further edit".
    instruction_tokens: Length of the instruction; 0 for drafts and after the chain has finished.
    seconds: Time of the batch divided by its rows, without compilation.
    chain_text: What the model wrote after the sample had finished, where its chain continues;
      `text` is "" then.
  """

  chain_score: float | None
  says_stop: bool
  instruction_tokens: int
  seconds: float
  chain_text: str | None = None


@dataclasses.dataclass(frozen=True)
class Answer:
  """A question about the first or the last image of a chain, and what the model answered.

  Attributes:
    kind: Kind of question, see `questions.Questionnaire`; about the last image it ends in
      `evaluate.LAST_IMAGE`.
    question: Its text.
    expected: Word that is the right answer.
    answer: Word that the model answered, "" if there is none in its text.
    text: All that the model wrote.
  """

  kind: str
  question: str
  expected: str
  answer: str
  text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
  """A chain of images for one prompt: a draft, and what edits made of it.

  Attributes:
    step: Iteration of the policy.
    key: Name of the sample, unique in its folder; links of the page contain it.
    prompt: Text of the prompt.
    tag: Kind of prompt.
    turns: Images in order, at least one.
    answers: Questions about the first image and the last; None if none are ever asked.
  """

  step: int
  key: str
  prompt: str
  tag: str
  turns: Sequence[Turn]
  answers: Sequence[Answer] | None = None

  def to_json(self) -> dict:
    """Returns the sample as JSON values, a line of samples.jsonl."""
    values = {
      "step": self.step,
      "key": self.key,
      "prompt": self.prompt,
      "tag": self.tag,
      "turns": [turn.to_json() for turn in self.turns],
    }
    if self.answers is not None:
      values["answers"] = [
        dataclasses.asdict(answer) for answer in self.answers
      ]
    return values

  @classmethod
  def from_json(cls, values: Mapping) -> "Sample":
    """Returns the sample of a line of samples.jsonl.

    Raises:
      KeyError, TypeError, ValueError, AttributeError: The line is of no sample.
    """
    turns = []
    for turn in values["turns"]:
      turn_class = EvaluatedTurn if "chain_score" in turn else Turn
      _check_types(turn, _TURN_TYPES)
      if not _IMAGE_PATH.fullmatch(turn["image"]):
        raise ValueError(
          f"image must be a path in the folder, not {turn['image']!r}"
        )
      turns.append(turn_class(**turn))
    _check_types(values, _SAMPLE_TYPES)
    if not turns:
      raise ValueError("turns must not be empty")
    answers = values.get("answers")
    if answers is not None:
      answers = tuple(Answer(**answer) for answer in answers)
    return cls(**{**values, "turns": tuple(turns), "answers": answers})


_Types = type | types.UnionType
_NUMBER = int | float | None
_SAMPLE_TYPES: Mapping[str, _Types] = {
  "step": int,
  "key": str,
  "prompt": str,
  "tag": str,
}
_TURN_TYPES: Mapping[str, _Types] = {
  "image": str,
  "score": _NUMBER,
  "text": str,
  "instruction": str,
  "stop": bool,
  "parts": dict | None,
  "format": _NUMBER,
  "tokens": int | None,
  "boxes": list | None,
  "reason": str | None,
  "chain_score": _NUMBER,
  "says_stop": bool,
  "instruction_tokens": int,
  "seconds": int | float,
}


def _check_types(values: Mapping, expected: Mapping[str, _Types]) -> None:
  """Raises a TypeError where a value that is there has another type."""
  for name, kind in expected.items():
    if name in values and not isinstance(values[name], kind):
      raise TypeError(f"{name} must not be {str(values[name])[:40]!r}")


def append(
  folder: epath.PathLike,
  samples: Sequence[Sample],
  images: Mapping[str, np.ndarray],
) -> None:
  """Writes images into a folder, then appends samples to its samples.jsonl.

  The lines are written last, so that no line names an image that is not there.

  Args:
    folder: Folder of samples.jsonl; it is made if missing.
    samples: Samples to append.
    images: uint8 [H, W, 3] by the paths that the samples name.

  Raises:
    ValueError: An image is missing or no uint8 [H, W, 3], or a path has other characters than
      letters, digits, "_", "-" and "/", or does not end in ".png".
  """
  folder = epath.Path(folder)
  named = set()
  for sample in samples:
    named.update(turn.image for turn in sample.turns)
  missing = sorted(named - images.keys())
  if missing:
    raise ValueError(
      f"the samples name images that are not given: {missing[:3]}"
    )
  for path in images:
    if not _IMAGE_PATH.fullmatch(path):
      raise ValueError(
        f"an image's path must match {_IMAGE_PATH.pattern}, got {path!r}"
      )

  parents = {(folder / path).parent for path in images}
  for parent in {folder, *parents}:
    parent.mkdir(parents=True, exist_ok=True)

  def write(path: str) -> None:
    """Encodes and writes one image."""
    (folder / path).write_bytes(preprocess.png(images[path]))

  with futures.ThreadPoolExecutor(_WRITERS) as pool:
    # The list waits for all writes, and raises their errors.
    list(pool.map(write, images))
  jsonl.append(folder / _FILE, [sample.to_json() for sample in samples])


def read(folder: epath.PathLike) -> list[Sample]:
  """Returns the samples of a folder by iteration, in the order of their writing.

  Lines that are of no sample are left out with a warning.

  Raises:
    ValueError: What lies there is no file.
    OSError: The file cannot be read.
  """
  path = epath.Path(folder) / _FILE
  samples = []
  num_damaged = 0
  reason = ""
  for line in jsonl.read(path):
    try:
      samples.append(Sample.from_json(line))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
      num_damaged += 1
      reason = reason or damage.reason(error)
  if num_damaged:
    logging.warning(
      "%s: %d lines are of no sample and are left out; the first: %s",
      path,
      num_damaged,
      reason,
    )
  return samples


def read_evaluated(folder: epath.PathLike) -> dict[str, Sample]:
  """Returns the latest evaluated sample of every key in a folder; raises as `read`.

  Samples without the measurements of an evaluation are left out.
  """
  samples = {}
  for sample in read(folder):
    if all(isinstance(turn, EvaluatedTurn) for turn in sample.turns):
      samples[sample.key] = sample
  return samples


def path(folder: epath.PathLike) -> epath.Path:
  """Returns the file of a folder's samples, whose parts may take its place."""
  return epath.Path(folder) / _FILE


def exists(folder: epath.PathLike) -> bool:
  """Returns whether a folder holds samples, in one file or in parts."""
  folder = epath.Path(folder)
  return (folder / _FILE).exists() or (folder / f"{_FILE}.parts").exists()


def drop_after(folder: epath.PathLike, step: int | None) -> None:
  """Drops the samples of iterations after `step`, or all if it is None.

  A resumed run repeats those iterations. Images stay until they are written again.
  """
  jsonl.drop_after(epath.Path(folder) / _FILE, step)

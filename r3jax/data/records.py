"""Prompts with what their images must show, and the JSON lines that hold them.

`Prompt` is the type that travels through the program. JSON appears only on disk, in TFDS and in
requests to services: `Prompt.from_json` and `Prompt.to_json` are the border.
"""

import collections
from collections.abc import Collection, Iterable, Sequence
import dataclasses
import hashlib
import json

from absl import logging

from r3jax.data import validation
from r3jax.files import bounded
from r3jax.files import texts

UNTAGGED = "untagged"  # tag of a prompt that comes without one
# A file of another kind has a problem on every line; an error lists the first ones.
MAX_LISTED = 50


@dataclasses.dataclass(frozen=True)
class Expectation:
  """What a prompt says about one class of objects; an item of `include` or `exclude`.

  Attributes:
    class_name: the class of the objects, for example "traffic light" ("class" in JSON).
    count: the number of objects. In `include` exactly this many are asked for, in `exclude` fewer
      than this many may be there.
    color: their colour.
    position: (relation, index of another `include` item): these objects stand in the relation to
      that item's objects.
    region: the part of the frame that they are in (GenEval++).
    size: their size compared with the other item's objects (GenEval++).
  """

  class_name: str
  count: int
  color: str | None = None
  position: tuple[str, int] | None = None
  region: str | None = None
  size: str | None = None

  @classmethod
  def from_json(cls, item: dict) -> "Expectation":
    """Builds the expectation of an item that `validation.find_problems` accepts."""
    position = None
    if "position" in item:
      position = tuple(item["position"])
    attributes = {name: item.get(name) for name in validation.ATTRIBUTES}
    return cls(
      class_name=item["class"],
      count=item["count"],
      position=position,
      **attributes,
    )

  def to_json(self) -> dict:
    """Returns the item as GenEval writes it, without the fields that are None."""
    item: dict = {"class": self.class_name, "count": self.count}
    for name in validation.ATTRIBUTES:
      value = getattr(self, name)
      if value is not None:
        item[name] = value
    if self.position is not None:
      item["position"] = list(self.position)
    return item


@dataclasses.dataclass(frozen=True)
class Question:
  """A question about the image, with the answer that the prompt implies.

  Attributes:
    text: the question.
    answer: "yes" or "no".
  """

  text: str
  answer: str

  @classmethod
  def from_json(cls, pair: Sequence[str]) -> "Question":
    """Builds the question of a valid (text, answer).

    TIIF pads its texts with blanks and writes both "yes" and "Yes".
    """
    text, answer = pair
    return cls(text.strip(), answer.strip().lower())

  def to_json(self) -> list[str]:
    """Returns [text, answer]."""
    return [self.text, self.answer]


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A prompt with what its image must show.

  That is `include` items, `questions`, an `inscription`, or the text alone.

  Attributes:
    tag: the task of the benchmark, for example "counting" or "colors".
    text: the prompt itself ("prompt" in JSON).
    include: the objects that the image must show (GenEval, GenEval++).
    exclude: the objects that it must not show.
    questions: what is asked about the image (TIIF).
    inscription: the text that must be written in the image, without its quotes.
  """

  tag: str
  text: str
  include: tuple[Expectation, ...] = ()
  exclude: tuple[Expectation, ...] = ()
  questions: tuple[Question, ...] = ()
  inscription: str | None = None

  @classmethod
  def from_json(cls, obj: object, where: str = "the record") -> "Prompt":
    """Builds a prompt from a JSON object.

    Args:
      obj: one of the forms in `data/validation.py`; further keys are ignored.
      where: names the object in the error, for example "train.jsonl:12".

    Raises:
      ValueError: everything that is wrong with the object, one problem a line.
    """
    problems = validation.find_problems(obj)
    if problems:
      raise ValueError("\n".join(f"{where}: {problem}" for problem in problems))
    return _from_valid(obj)

  def to_json(self) -> dict:
    """Returns the prompt as a JSON object that `from_json` accepts.

    Returns:
      {"tag", "prompt", "include", "exclude"?} as GenEval writes it, {"tag", "prompt",
      "questions": [[text, answer], ...]} or {"tag", "prompt", "inscription"?}. The order of the
      keys is part of the hashes that identify training sets and held-out sets.
    """
    obj: dict = {"tag": self.tag, "prompt": self.text}
    if self.include:
      obj["include"] = [item.to_json() for item in self.include]
    if self.exclude:
      obj["exclude"] = [item.to_json() for item in self.exclude]
    if self.questions:
      obj["questions"] = [question.to_json() for question in self.questions]
    if self.inscription is not None:
      obj["inscription"] = self.inscription
    return obj


def sha256(prompts: Iterable[Prompt]) -> str:
  """Returns the hash that identifies prompts in manifests: SHA-256 of their JSON, in hex digits."""
  text = json.dumps([prompt.to_json() for prompt in prompts])
  return hashlib.sha256(text.encode()).hexdigest()


def _from_valid(obj: dict) -> Prompt:
  """Builds the prompt of an object that has no problems."""
  tag = obj.get("tag", UNTAGGED)
  if "include" in obj:
    return Prompt(
      tag=tag,
      text=obj["prompt"],
      include=tuple(map(Expectation.from_json, obj["include"])),
      exclude=tuple(map(Expectation.from_json, obj.get("exclude") or ())),
    )
  if "questions" in obj:
    return Prompt(
      tag=tag,
      text=obj["prompt"],
      questions=tuple(map(Question.from_json, obj["questions"])),
    )
  if "yn_question_list" not in obj:
    return Prompt(
      tag=tag, text=obj["prompt"], inscription=obj.get("inscription")
    )
  pairs = zip(obj["yn_question_list"], obj["yn_answer_list"], strict=True)
  return Prompt(
    tag=obj.get("type", UNTAGGED),
    text=obj["short_description"].strip(),
    questions=tuple(map(Question.from_json, pairs)),
  )


@dataclasses.dataclass(frozen=True)
class Reading:
  """How a file of prompts is read.

  Attributes:
    tags: the tags that records with `include` or questions may have; any, or none, if it is None.
    mixed: whether lines of text may stand beside lines of JSON.
    repeats: whether a prompt may appear several times.
  """

  tags: Collection[str] | None = None
  mixed: bool = False
  repeats: bool = False


_STRICT = Reading()


def parse(
  content: bytes, name: str, reading: Reading = _STRICT
) -> list[Prompt]:
  """Parses a file of prompts: a JSON object a line, or a text a line; empty lines are skipped.

  A file with a line that begins with "{" is JSON, and all of its lines must be. A prompt may appear
  once. Records with questions share prompts, so that there the whole record may appear once. A file
  with k > 1 copies of every record, as the reference's own, is accepted.

  Args:
    content: UTF-8 text, with or without a byte order mark.
    name: names the content in the error, for example its path.
    reading: what else the file may hold.

  Raises:
    ValueError: the text or a record is invalid, has another tag or repeats. The message lists the
      problems (the first 50) with their line numbers.
  """
  return [prompt for _, prompt in parse_numbered(content, name, reading)]


def parse_numbered(
  content: bytes, name: str, reading: Reading = _STRICT
) -> list[tuple[int, Prompt]]:
  """Parses a file as `parse` does; returns the number of its line, from 1, beside every prompt."""
  try:
    lines = texts.lines(content)
  except ValueError as error:
    raise ValueError(problems_text([f"{name}:1: {error}"])) from error
  is_json = any(map(_is_json, lines))
  problems = []
  entries = []
  for number, line in enumerate(lines, start=1):
    if not line.strip():
      continue
    try:
      if _is_json(line) or (is_json and not reading.mixed):
        obj = _parse_line(line)
      else:
        obj = {"prompt": _parse_text(line)}
    except ValueError as error:
      problems.append(f"{name}:{number}: {error}")
      continue
    line_problems = validation.find_problems(obj, reading.tags)
    problems += [f"{name}:{number}: {problem}" for problem in line_problems]
    if not line_problems:
      entries.append(_Entry.from_json(obj, number))
  if not reading.repeats:
    problems += _repeat_problems(entries, name, bool(problems))
  if problems:
    raise ValueError(problems_text(problems))
  return [(entry.line, entry.prompt) for entry in entries]


def _is_json(line: bytes) -> bool:
  """Returns whether a line is meant as JSON: it begins as an object, or is an array."""
  line = line.strip()
  if not line.startswith(b"["):
    return line.startswith(b"{")
  # "[style] a cat" is a text.
  try:
    bounded.parse_json(line, bounded.MESSAGE_LIMITS)
  except ValueError:
    return False
  return True


def _repeat_problems(
  entries: list["_Entry"], name: str, has_problems: bool
) -> list[str]:
  """Returns a problem for every repeated prompt of a file, unless it holds all of them k times.

  Args:
    entries: valid lines of the file.
    name: names the file.
    has_problems: whether the file has other problems.
  """
  # The reference's file of GenEval's 553 prompts holds each of them four times.
  copies = _copies(entries)
  if copies > 1 and not has_problems:
    logging.info("%s holds each of its prompts %d times", name, copies)
    return []
  return [f"{name}:{problem}" for problem in _repeats(entries)]


@dataclasses.dataclass(frozen=True)
class _Entry:
  """A valid line of a file.

  Attributes:
    line: its number, from 1.
    prompt: the prompt that it holds.
    unique: what may appear once in a file.
  """

  line: int
  prompt: Prompt
  unique: tuple

  @classmethod
  def from_json(cls, obj: dict, line: int) -> "_Entry":
    prompt = _from_valid(obj)
    if prompt.questions:
      unique = (prompt, obj.get("long_description"))
      return cls(line, prompt, unique)
    return cls(line, prompt, unique=(prompt.text,))


def _parse_text(line: bytes) -> str:
  """Returns the text of a line without the blanks around it.

  Raises:
    ValueError: the line is not UTF-8.
  """
  try:
    return line.decode().strip()
  except ValueError as error:
    raise ValueError(f"the line must be UTF-8: {error}") from error


def _parse_line(line: bytes) -> object:
  """Returns the value of a line of JSON.

  Raises:
    ValueError: the line is not JSON, not UTF-8, repeats a key, or exceeds
      `bounded.MESSAGE_LIMITS`.
  """
  try:
    return bounded.parse_json(
      line, bounded.MESSAGE_LIMITS, pairs_hook=_unique_keys
    )
  except json.JSONDecodeError as error:
    raise ValueError(
      f"the line must be JSON: {error.msg} (column {error.colno})"
    ) from error
  except ValueError as error:
    raise ValueError(f"the line must be JSON: {error}") from error


def _unique_keys(pairs: list[tuple[str, object]]) -> dict:
  """Builds an object whose keys appear once; `json` alone would keep the last of them."""
  obj = dict(pairs)
  if len(obj) != len(pairs):
    counts = collections.Counter(key for key, _ in pairs)
    repeated = counts.most_common(1)[0][0]
    raise ValueError(f"key {validation.show(repeated)} must stand once")
  return obj


def _copies(entries: list[_Entry]) -> int:
  """Returns k if every record appears exactly k times, else 1."""
  counts = collections.Counter(
    (entry.unique, entry.prompt) for entry in entries
  )
  keys = {unique for unique, _ in counts}
  multiplicities = set(counts.values())
  if len(multiplicities) == 1 and len(keys) == len(counts):
    return multiplicities.pop()
  return 1


def _repeats(entries: list[_Entry]) -> list[str]:
  """Returns a problem for every entry that repeats an earlier line, its line number first."""
  first_line: dict[tuple, int] = {}
  problems = []
  for entry in entries:
    first = first_line.setdefault(entry.unique, entry.line)
    if first != entry.line:
      subject = "record of prompt" if entry.prompt.questions else "prompt"
      text = validation.show(entry.prompt.text)
      problems.append(f"{entry.line}: {subject} {text} repeats line {first}")
  return problems


def problems_text(problems: Sequence[str]) -> str:
  """Returns an error's text, with at most MAX_LISTED of the problems with prompts."""
  lines = [f"{len(problems)} problems with prompts:", *problems[:MAX_LISTED]]
  remaining = len(problems) - MAX_LISTED
  if remaining > 0:
    lines.append(f"... and {remaining} more")
  return "\n".join(lines)

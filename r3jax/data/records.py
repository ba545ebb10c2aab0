"""Reads prompt records from JSON lines, refusing a file that holds a bad one."""

import collections
from collections.abc import Collection, Sequence
import dataclasses
import hashlib
import json

from absl import logging
from etils import epath

from r3jax.data import validation

# Problems that an error lists; a file of another kind has one on every line.
MAX_LISTED = 50


@dataclasses.dataclass(frozen=True)
class Expectation:
  """What a prompt says of one class of objects; an item of `include` or `exclude`."""

  class_name: str  # "class" in the file
  # include: so many; exclude: fewer than so many
  count: int
  color: str | None = None
  # (relation, index of the other include item)
  position: tuple[str, int] | None = None
  region: str | None = None  # place in the frame
  size: str | None = None

  @classmethod
  def from_json(cls, item: dict) -> "Expectation":
    """Builds the expectation of a valid item."""
    position = tuple(item["position"]) if "position" in item else None
    attributes = {name: item.get(name) for name in validation.ATTRIBUTES}
    return cls(item["class"], item["count"], position=position, **attributes)

  def to_json(self) -> dict:
    """Returns the item as GenEval writes it, without the fields that say nothing."""
    said = {name: getattr(self, name) for name in validation.ATTRIBUTES}
    item = {"class": self.class_name, "count": self.count}
    item |= {name: value for name, value in said.items() if value is not None}
    return item | ({"position": list(self.position)} if self.position else {})


@dataclasses.dataclass(frozen=True)
class Question:
  """A question about the image with the answer that the prompt implies."""

  text: str
  answer: str  # "yes" or "no"

  @classmethod
  def from_json(cls, pair: Sequence[str]) -> "Question":
    """Builds the question of a valid (text, answer); TIIF pads texts and writes "yes" and "Yes"."""
    text, answer = pair
    return cls(text.strip(), answer.strip().lower())

  def to_json(self) -> list[str]:
    """Returns [text, answer]."""
    return [self.text, self.answer]


@dataclasses.dataclass(frozen=True)
class PromptRecord:
  """A prompt with what its image must show (R3.md section 11): include or questions, never both."""

  # 16 hex digits of a hash of the other fields
  id: str
  # the task of the benchmark: "counting", "colors", ...
  tag: str
  prompt: str
  include: tuple[Expectation, ...] = ()  # GenEval, GenEval++
  exclude: tuple[Expectation, ...] = ()
  questions: tuple[Question, ...] = ()  # TIIF

  @classmethod
  def from_json(cls, obj: dict, where: str) -> "PromptRecord":
    """Builds a record.

    Args:
      obj: one of the forms of data/validation.py; further keys are ignored.
      where: names the record in the error, for example "train.jsonl:12".

    Raises:
      ValueError: with everything that is wrong with the record.
    """
    problems = validation.find_problems(obj)
    if problems:
      raise ValueError("\n".join(f"{where}: {problem}" for problem in problems))
    if "include" in obj:
      include = tuple(map(Expectation.from_json, obj["include"]))
      exclude = tuple(map(Expectation.from_json, obj.get("exclude") or ()))
      record = cls("", obj["tag"], obj["prompt"], include, exclude)
    elif "questions" in obj:
      questions = tuple(map(Question.from_json, obj["questions"]))
      record = cls("", obj["tag"], obj["prompt"], questions=questions)
    else:
      questions = map(
        Question.from_json, zip(obj["yn_question_list"], obj["yn_answer_list"])
      )
      prompt = obj["short_description"].strip()
      record = cls("", obj["type"], prompt, questions=tuple(questions))
    return dataclasses.replace(record, id=_hash(record))

  def to_json(self) -> dict:
    """Returns the record as the worlds and the rewards take it.

    Returns:
      {"tag", "prompt", "include", "exclude"?} as GenEval writes it, or {"tag", "prompt",
      "questions": [[text, answer], ...]}. `from_json` takes it back.
    """
    record = {"tag": self.tag, "prompt": self.prompt}
    for field in ("include", "exclude", "questions"):
      items = [item.to_json() for item in getattr(self, field)]
      record |= {field: items} if items else {}
    return record


def read_jsonl(
  path: epath.PathLike, tags: Collection[str] | None = None
) -> list[PromptRecord]:
  """Reads the records of a file, see `parse_jsonl`."""
  return parse_jsonl(epath.Path(path).read_bytes(), str(path), tags)


def parse_jsonl(
  content: bytes, name: str, tags: Collection[str] | None = None
) -> list[PromptRecord]:
  """Parses records, one JSON object a line; empty lines and a byte order mark are skipped.

  A prompt may stand once; of records with questions, which share prompts, the whole record. A file
  of k > 1 copies of each record, as the reference's own, is taken as it is.

  Args:
    content: UTF-8 text.
    name: names the content in the error, for example its path.
    tags: the tags that may occur; any if None.

  Raises:
    ValueError: if the text or a record is invalid, has another tag or repeats. It lists the
      problems (the first 50) with their line numbers.
  """
  problems, entries = [], []
  for number, line in enumerate(
    content.removeprefix(b"\xef\xbb\xbf").splitlines(), start=1
  ):
    if not line.strip():
      continue
    found, obj = _parse(line)
    found = found or validation.find_problems(obj, tags)
    problems += [f"{name}:{number}: {problem}" for problem in found]
    if not found:
      entries.append(_Entry.from_json(obj, name, number))
  copies = _copies(entries)
  if copies > 1 and not problems:
    logging.info("%s holds each of its prompts %d times", name, copies)
  else:
    problems += [f"{name}:{problem}" for problem in _repeats(entries)]
  if problems:
    raise ValueError(_list(problems))
  return [entry.record for entry in entries]


@dataclasses.dataclass(frozen=True)
class _Entry:
  """A valid record of a file."""

  line: int
  record: PromptRecord
  once: tuple  # what may stand once in a file

  @classmethod
  def from_json(cls, obj: dict, name: str, line: int) -> "_Entry":
    record = PromptRecord.from_json(obj, f"{name}:{line}")
    once = (
      (record.prompt,)
      if record.include
      else (record, obj.get("long_description"))
    )
    return cls(line, record, once)


def _parse(line: bytes) -> tuple[list[str], object]:
  """Returns (problems, object) of a line of JSON."""
  try:
    obj = json.loads(
      line.decode(), object_pairs_hook=_object, parse_constant=_refuse_constant
    )
    return [], obj
  except json.JSONDecodeError as error:
    return [f"the line must be JSON: {error.msg} (column {error.colno})"], None
  except (ValueError, RecursionError) as error:
    # Not UTF-8, too long a number, too deep, a hook.
    return [f"the line must be JSON: {error}"], None


def _object(pairs: list[tuple[str, object]]) -> dict:
  """Returns the object, which `json` would let a key stand in twice."""
  obj = dict(pairs)
  if len(obj) != len(pairs):
    counts = collections.Counter(key for key, _ in pairs)
    raise ValueError(
      f"key {validation.show(counts.most_common(1)[0][0])} must stand once"
    )
  return obj


def _refuse_constant(name: str) -> None:
  raise ValueError(f"{name} is no JSON number")


def _copies(entries: list[_Entry]) -> int:
  """Returns k if every record stands exactly k times, else 1."""
  counts = collections.Counter((entry.once, entry.record) for entry in entries)
  distinct, same = {once for once, _ in counts}, set(counts.values())
  return same.pop() if len(same) == 1 and len(distinct) == len(counts) else 1


def _repeats(entries: list[_Entry]) -> list[str]:
  """Reports the records that stood on an earlier line, each after its line number."""
  first_line, problems = {}, []
  for entry in entries:
    first = first_line.setdefault(entry.once, entry.line)
    if first != entry.line:
      what = "prompt" if entry.record.include else "record of prompt"
      prompt = validation.show(entry.record.prompt)
      problems.append(f"{entry.line}: {what} {prompt} repeats line {first}")
  return problems


def _list(problems: list[str]) -> str:
  """Returns the text of an error."""
  head, more = (
    f"{len(problems)} problems with prompts:",
    len(problems) - MAX_LISTED,
  )
  tail = [f"... and {more} more"] if more > 0 else []
  return "\n".join([head, *problems[:MAX_LISTED], *tail])


def _hash(record: PromptRecord) -> str:
  """Returns 16 hex digits that depend on the record's meaning, not on the order of its keys."""
  obj = record.to_json()
  asked = (
    [obj["include"], obj.get("exclude") or []]
    if record.include
    else [obj["questions"]]
  )
  text = json.dumps(
    [record.tag, record.prompt, *asked], sort_keys=True, ensure_ascii=False
  )
  return hashlib.sha256(text.encode()).hexdigest()[:16]

"""Reads prompt records in GenEval's JSON-lines format, refusing a file that holds a bad one."""

from collections.abc import Collection, Sequence
import dataclasses
import hashlib
import json

from etils import epath

# What an item may say of its objects beside class and count; GenEval++ adds the last two.
_ATTRIBUTES = ("color", "region", "size")


@dataclasses.dataclass(frozen=True)
class Expectation:
  """What a prompt says of one class of objects; an item of `include` or `exclude`."""
  class_name: str                            # "class" in the file
  count: int                                 # include: so many; exclude: fewer than so many
  color: str | None = None
  position: tuple[str, int] | None = None    # (relation, index of the other include item)
  region: str | None = None                  # place in the frame
  size: str | None = None

  @classmethod
  def from_json(cls, item: dict) -> "Expectation":
    """Builds the expectation of a valid item."""
    position = tuple(item["position"]) if "position" in item else None
    attributes = {name: item.get(name) for name in _ATTRIBUTES}
    return cls(item["class"], item["count"], position=position, **attributes)

  def to_json(self) -> dict:
    """Returns the item as GenEval writes it, without the fields that say nothing."""
    item = {"class": self.class_name, "count": self.count}
    item |= {name: getattr(self, name) for name in _ATTRIBUTES if getattr(self, name) is not None}
    return item | ({"position": list(self.position)} if self.position else {})


@dataclasses.dataclass(frozen=True)
class PromptRecord:
  """A prompt with what its image must show (R3.md section 11)."""
  id: str                                # 16 hex digits of a hash of the other fields
  tag: str                               # the task of the benchmark: "counting", "colors", ...
  prompt: str
  include: tuple[Expectation, ...]
  exclude: tuple[Expectation, ...] = ()

  @classmethod
  def from_json(cls, obj: dict, where: str) -> "PromptRecord":
    """Builds a record.

    Args:
      obj: {"tag", "prompt", "include", "exclude"?}; further keys are ignored.
      where: names the record in the error, for example "train.jsonl:12".

    Raises:
      ValueError: with everything that is wrong with the record.
    """
    problems = find_problems(obj)
    if problems:
      raise ValueError("\n".join(f"{where}: {problem}" for problem in problems))
    include = tuple(map(Expectation.from_json, obj["include"]))
    exclude = tuple(map(Expectation.from_json, obj.get("exclude") or ()))
    return cls(_hash(obj), obj["tag"], obj["prompt"], include, exclude)

  def to_json(self) -> dict:
    """Returns the record as GenEval writes it: what the worlds and the rewards take."""
    record = {"tag": self.tag, "prompt": self.prompt,
              "include": [item.to_json() for item in self.include]}
    exclude = [item.to_json() for item in self.exclude]
    return record | ({"exclude": exclude} if exclude else {})


def read_jsonl(path: epath.PathLike, tags: Collection[str] | None = None) -> list[PromptRecord]:
  """Reads the records of a file, one JSON object a line; empty lines are skipped.

  Args:
    path: the file.
    tags: the tags that may occur; any if None.

  Raises:
    ValueError: if a record is invalid, has another tag or repeats a prompt. It lists every
      problem of the file with its line number.
  """
  records, problems, first_line = [], [], {}
  for number, line in enumerate(epath.Path(path).read_text().splitlines(), start=1):
    if not line.strip():
      continue
    found, obj = _parse(line)
    found = found or find_problems(obj, tags) or _repeats(obj["prompt"], number, first_line)
    if found:
      problems += [f"{path}:{number}: {problem}" for problem in found]
    else:
      records.append(PromptRecord.from_json(obj, f"{path}:{number}"))
  if problems:
    raise ValueError(f"{len(problems)} problems with prompts:\n" + "\n".join(problems))
  return records


def find_problems(obj: object, tags: Collection[str] | None = None) -> list[str]:
  """Lists what keeps an object from being a prompt record with one of `tags` (any if None)."""
  if not isinstance(obj, dict):
    return [f"a record must be a JSON object, got {type(obj).__name__}"]
  problems = [f"{field} must be a non-empty string, got {obj.get(field)!r}"
              for field in ("tag", "prompt") if not _is_text(obj.get(field))]
  if tags is not None and _is_text(obj.get("tag")) and obj["tag"] not in tags:
    problems.append(f"tag must be one of {sorted(tags)}, got {obj['tag']!r}")
  include, exclude = obj.get("include"), obj.get("exclude") or []
  if not isinstance(include, list) or not include:
    return problems + [f"include must be a non-empty list, got {include!r}"]
  if not isinstance(exclude, list):
    return problems + [f"exclude must be a list, got {exclude!r}"]
  for index, item in enumerate(include):
    problems += [f"include[{index}]: {problem}" for problem in _item_problems(item, index, include)]
  for index, item in enumerate(exclude):
    problems += [f"exclude[{index}]: {problem}" for problem in _item_problems(item, index, ())]
  return problems


def _item_problems(item: object, index: int, others: Sequence) -> list[str]:
  """Lists what is wrong with an item; a position must point at another one of `others`."""
  if not isinstance(item, dict):
    return [f"an item must be a JSON object, got {item!r}"]
  problems = []
  if not _is_text(item.get("class")):
    problems.append(f"class must be a non-empty string, got {item.get('class')!r}")
  if not _is_index(item.get("count")) or item["count"] < 1:
    problems.append(f"count must be an integer of at least 1, got {item.get('count')!r}")
  problems += [f"{name} must be a non-empty string, got {item[name]!r}"
               for name in _ATTRIBUTES if name in item and not _is_text(item[name])]
  if "position" in item and not _is_position(item["position"], index, others):
    problems.append("position must be [relation, index of another include item (0 to "
                    f"{len(others) - 1})], got {item['position']!r}")
  return problems


def _is_position(position: object, index: int, others: Sequence) -> bool:
  return (isinstance(position, list) and len(position) == 2 and _is_text(position[0])
          and _is_index(position[1]) and position[1] in range(len(others))
          and position[1] != index)


def _is_text(value: object) -> bool:
  return isinstance(value, str) and bool(value.strip())


def _is_index(value: object) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _parse(line: str) -> tuple[list[str], object]:
  """Returns (problems, object) of a line of JSON."""
  try:
    return [], json.loads(line)
  except json.JSONDecodeError as error:
    return [f"the line must be JSON: {error}"], None


def _repeats(prompt: str, number: int, first_line: dict[str, int]) -> list[str]:
  """Reports a prompt that stood on an earlier line; notes the line of a new one."""
  first = first_line.setdefault(prompt, number)
  return [] if first == number else [f"prompt {prompt!r} repeats line {first}"]


def _hash(obj: dict) -> str:
  """Returns 16 hex digits that depend on the record's meaning, not on the order of its keys."""
  content = [obj["tag"], obj["prompt"], obj["include"], obj.get("exclude") or []]
  text = json.dumps(content, sort_keys=True, ensure_ascii=False)
  return hashlib.sha256(text.encode()).hexdigest()[:16]

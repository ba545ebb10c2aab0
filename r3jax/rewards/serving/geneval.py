"""GenEval's rules on detected objects (arXiv 2310.11513), in plain Python floats of 64 bits.

Three different numbers come out, and all are logged:
- `correct`: the official verdict. For an item that asks for `count` objects the official code takes
  the surest `count` of its class and looks at no others: all of them must have the item's colour,
  and each must stand in its relation to each of those taken for the other item, which must itself
  be right. An exclude counts all objects of its class: fewer than its count may be there.
- `strict`: every class has exactly as many objects as the items ask for together, every colour too,
  relations and excludes hold. It implies `correct` where the items name different classes. Items of
  one class are officially judged by the same surest objects, so that no image is `correct` for a
  red and a blue cup; GenEval has no such prompt.
- `score`: shaped, in [0, 1], and 1 exactly where `strict`; see `_score`.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math

from r3jax.data import validation
from r3jax.data.generators import geneval

# of GenEval++: they need a vision-language judge
_NOT_JUDGED = ("region", "size")


@dataclasses.dataclass(frozen=True)
class Detection:
  """One object that a detector found.

  Attributes:
    class_name: in GenEval's words.
    confidence: in [0, 1].
    box: x0, y0, x1, y1 in pixels.
    color: what the colour classifier says of the crop; None if it was not asked.
  """

  class_name: str
  confidence: float
  box: tuple[float, float, float, float]
  color: str | None = None


@dataclasses.dataclass(frozen=True)
class Thresholds:
  """What counts as an object and as a relation; the defaults are the official ones.

  Attributes:
    confidence: an object must be surer than this.
    counting_confidence: the same for prompts of the tag "counting".
    max_objects: of a class, the surest first.
    position: share of the two sizes by which an offset is shrunk.
  """

  confidence: float = 0.3
  counting_confidence: float = 0.9
  max_objects: int = 16
  position: float = 0.1

  def __post_init__(self):
    for name in ("confidence", "counting_confidence", "position"):
      if not 0 <= getattr(self, name) < 1:
        raise ValueError(f"{name} must be in [0, 1); got {getattr(self, name)}")
    if self.max_objects < 1:
      raise ValueError(
        f"max_objects must be at least 1; got {self.max_objects}"
      )


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What an image earned.

  Attributes:
    correct, strict, score: see the module's docstring.
    reasons: what the official rules found wrong; empty if correct.
  """

  correct: bool
  strict: bool
  score: float
  reasons: tuple[str, ...]


_Objects = Mapping[str, Sequence[Detection]]  # by class, the surest first


def check_record(record: dict):
  """Checks that the rules can judge a record.

  Raises:
    ValueError: it is no valid record with include items, an item has what only a judge can see,
      a relation is unknown or does not point to an earlier item, or as few objects are excluded as
      are asked for.
  """
  if problems := validation.find_problems(record):
    raise ValueError(f"GenEval's rules need a valid record: {problems[0]}")
  if "include" not in record:
    raise ValueError(
      f"GenEval's rules need a record with include items; got {sorted(record)}"
    )
  for index, item in enumerate(record["include"]):
    _check_item(item, index)
  for index, item in enumerate(_excluded(record)):
    needed = sum(
      one["count"] for one in _of_class(item["class"], record["include"])
    )
    if item["count"] <= needed:
      raise ValueError(
        f"the count of exclude[{index}] must be more than the {needed} "
        f"{item['class']} asked for; got {item['count']}"
      )


def _check_item(item: dict, index: int):
  """Raises ValueError where the rules cannot judge an include item."""
  if present := [name for name in _NOT_JUDGED if name in item]:
    raise ValueError(
      f"GenEval's rules do not know {present} of include[{index}]; use a judge"
    )
  if "position" not in item:
    return
  relation, other = item["position"]
  if relation not in geneval.RELATIONS:
    raise ValueError(
      f"the relation of include[{index}] must be one of "
      f"{list(geneval.RELATIONS)}; got {relation!r}"
    )
  if not 0 <= other < index:  # the official code has not judged later items yet
    raise ValueError(
      f"the position of include[{index}] must point to an item before it; "
      f"got {other}"
    )


def judge(
  record: dict,
  detections: Sequence[Detection],
  thresholds: Thresholds = Thresholds(),
) -> Verdict:
  """Judges an image by what was found in it.

  Args:
    record: in GenEval's format, one that `check_record` lets pass.
    detections: of the image; other classes than the record's do not matter. Of equally sure ones
      the first counts as surer (officially this is left to an unstable sort).
    thresholds: what counts.
  """
  include, objects = record["include"], _counted(record, detections, thresholds)
  broken = [
    item
    for item in _excluded(record)
    if len(_found(item, objects)) >= item["count"]
  ]
  clauses = [_clauses(item, include, objects, thresholds) for item in include]
  reasons = _wrong_items(include, objects, thresholds) + [
    f"expected fewer than {item['count']} {item['class']}, found {len(_found(item, objects))}"
    for item in broken
  ]
  strict = not broken and all(
    clause == 1 for item in clauses for clause in item
  )
  unnamed = sum(not _of_class(item["class"], include) for item in broken)
  return Verdict(not reasons, strict, _score(clauses, unnamed), tuple(reasons))


def _excluded(record: dict) -> Sequence[dict]:
  """Returns the exclude items; records may leave them out or say null."""
  return record.get("exclude") or ()


def _of_class(name: str, items: Sequence[dict]) -> list[dict]:
  """Returns the items of a class."""
  return [item for item in items if item["class"] == name]


def _counted(
  record: dict, detections: Sequence[Detection], thresholds: Thresholds
) -> _Objects:
  """Returns the objects that count, by class."""
  counting = record["tag"] == "counting"
  least = thresholds.counting_confidence if counting else thresholds.confidence
  sure = [one for one in detections if one.confidence > least]
  found: dict[str, list[Detection]] = {}
  for detection in sorted(sure, key=lambda one: -one.confidence):
    same = found.setdefault(detection.class_name, [])
    if len(same) < thresholds.max_objects:
      same.append(detection)
  return found


def _found(item: dict, objects: _Objects) -> Sequence[Detection]:
  """Returns the objects of an item's class."""
  return objects.get(item["class"], ())


def _wrong_items(
  include: Sequence[dict], objects: _Objects, thresholds: Thresholds
) -> list[str]:
  """Returns what the official rules find wrong with the items, at most one reason an item."""
  # matched: the objects taken for each item, None where it is wrong
  reasons, matched = [], []
  for item in include:
    taken = _found(item, objects)[: item["count"]]
    reason = _wrong_count(item, taken) or _wrong_color(item, taken)
    if "position" in item and not reason:
      relation, other = item["position"]
      reason = _wrong_position(
        item, taken, include[other], matched[other], thresholds
      )
    matched.append(None if reason else taken)
    reasons += [reason] if reason else []
  return reasons


def _wrong_count(item: dict, taken: Sequence[Detection]) -> str:
  """Says how many objects there are where they are too few."""
  if len(taken) >= item["count"]:
    return ""
  return (
    f"expected at least {item['count']} {item['class']}, found {len(taken)}"
  )


def _wrong_color(item: dict, taken: Sequence[Detection]) -> str:
  """Says which colours the objects have where too few have the item's."""
  colors = [one.color for one in taken]
  if "color" not in item or colors.count(item["color"]) >= item["count"]:
    return ""
  return f"expected {item['count']} {item['color']} {item['class']}, found the colours {colors}"


def _wrong_position(
  item: dict,
  taken: Sequence[Detection],
  other: dict,
  others: Sequence[Detection] | None,
  thresholds: Thresholds,
) -> str:
  """Says how a pair stands that is not in the item's relation to the other item."""
  relation = item["position"][0]
  if others is None:
    return f"there is no {other['class']} for {item['class']} to be {relation}"
  for found in _pair_relations(taken, others, thresholds):
    if relation not in found:
      seen = " and ".join(sorted(found)) or "no relation"
      return (
        f"expected {item['class']} {relation} {other['class']}, found {seen}"
      )
  return ""


def _pair_relations(
  taken: Sequence[Detection],
  others: Sequence[Detection],
  thresholds: Thresholds,
) -> list[set[str]]:
  """Returns the relations of every taken object to every one of the others."""
  return [
    relations(a.box, b.box, thresholds.position) for a in taken for b in others
  ]


def relations(
  a: Sequence[float], b: Sequence[float], threshold: float
) -> set[str]:
  """Returns the relations of box a to box b (x0, y0, x1, y1).

  With d the offset of a's centre from b's: r = sign(d) max(|d| - threshold (size a + size b), 0)
  per axis. There is none if r is below 1e-3 pixels on both axes; else a relation holds where
  r / |d|₂ is beyond 0.5 in its direction, which two may be on a diagonal.
  """
  offset = [(a[k] + a[k + 2] - b[k] - b[k + 2]) / 2 for k in (0, 1)]
  sizes = [abs(a[k + 2] - a[k]) + abs(b[k + 2] - b[k]) for k in (0, 1)]
  shrunk = [
    math.copysign(max(abs(d) - threshold * size, 0.0), d)
    for d, size in zip(offset, sizes)
  ]
  if all(abs(r) < 1e-3 for r in shrunk):
    return set()
  x, y = (r / math.hypot(*offset) for r in shrunk)
  holds = dict(zip(geneval.RELATIONS, (x < -0.5, x > 0.5, y < -0.5, y > 0.5)))
  return {relation for relation, there in holds.items() if there}


def _clauses(
  item: dict, include: Sequence[dict], objects: _Objects, thresholds: Thresholds
) -> list[float]:
  """Returns how well each clause of an item is met, in [0, 1]: count[, colour][, relation].

  Items of one class, or of one class and colour, are counted together. A relation is one between
  objects of the items' colours: 1 if it holds for every pair of the surest that are asked for.
  """
  same = _of_class(item["class"], include)
  found = [
    _closeness(
      sum(other["count"] for other in same), len(_found(item, objects))
    )
  ]
  if "color" in item:
    need = sum(
      other["count"] for other in same if other.get("color") == item["color"]
    )
    found.append(_closeness(need, len(_fitting(item, objects))))
  if "position" in item:
    relation, other = item["position"]
    pair = item, include[other]
    taken, others = (_fitting(one, objects)[: one["count"]] for one in pair)
    there = len(taken) == pair[0]["count"] and len(others) == pair[1]["count"]
    pairs = _pair_relations(taken, others, thresholds)
    found.append(float(there and all(relation in one for one in pairs)))
  return found


def _fitting(item: dict, objects: _Objects) -> list[Detection]:
  """Returns the objects of an item's class, and of its colour if it names one."""
  return [
    one
    for one in _found(item, objects)
    if item.get("color") in (None, one.color)
  ]


def _closeness(need: int, found: int) -> float:
  """Returns max(0, 1 - |need - found| / need)."""
  return max(0.0, 1 - abs(need - found) / need)


def _score(clauses: Sequence[Sequence[float]], unnamed: int) -> float:
  """Returns the mean over items of the mean of an item's clauses, divided by 1 + `unnamed`.

  A right pair in the wrong relation earns (1 + (1 + 0) / 2) / 2 = 0.75. So it does in the
  reference, though there by adding a 1 after the 0 of the failed relation (of four clauses three
  are met); its count clause has no lower bound either: 16 objects for one are -14.

  Args:
    clauses: of every item.
    unnamed: excludes that do not hold, of classes that no item names. Other excludes are in the
      count clause: the class has as many objects as asked for, or the clause is below 1.
  """
  return (
    sum(sum(item) / len(item) for item in clauses)
    / len(clauses)
    / (1 + unnamed)
  )

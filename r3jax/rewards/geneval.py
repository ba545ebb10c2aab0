"""GenEval's rules on detected objects (arXiv 2310.11513), in plain Python.

Three different numbers come out, and all are logged:
- `correct`: the official verdict. Every include item has at least `count` objects of its class; the
  most confident `count` of them have its colour and stand in its relation to every such object of
  the other item; every exclude item has fewer than its count.
- `strict`: every class has exactly as many objects as the items ask for, every colour too, relations
  and excludes hold.
- `score`: shaped, in [0, 1]; see `_score`.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math

RELATIONS = ("left of", "right of", "above", "below")
_NOT_JUDGED = ("region", "size")  # of GenEval++: they need a vision-language judge


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
      raise ValueError(f"max_objects must be at least 1; got {self.max_objects}")


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
  """Raises ValueError where the rules cannot judge a record."""
  if not record.get("include"):
    raise ValueError(f"GenEval's rules need a record with include items; got {sorted(record)}")
  for index, item in enumerate(record["include"]):
    if present := [name for name in _NOT_JUDGED if name in item]:
      raise ValueError(f"GenEval's rules do not know {present} of include[{index}]; use a judge")
    relation, other = item.get("position", (RELATIONS[0], index - 1))
    if relation not in RELATIONS:
      raise ValueError(f"the relation of include[{index}] must be one of {list(RELATIONS)}; got {relation!r}")
    if "position" in item and not 0 <= other < index:
      raise ValueError(f"the position of include[{index}] must point to an item before it; got {other}")


def judge(record: dict, detections: Sequence[Detection], thresholds: Thresholds = Thresholds()) -> Verdict:
  """Judges an image by what was found in it.

  Args:
    record: in GenEval's format, see `check_record`.
    detections: of the image; other classes than the record's do not matter.
    thresholds: what counts.
  """
  objects = _counted(record, detections, thresholds)
  reasons = _wrong_items(record["include"], objects, thresholds) + _wrong_excludes(record, objects)
  clauses = [_clauses(item, record["include"], objects, thresholds) for item in record["include"]]
  strict = all(clause == 1 for item in clauses for clause in item) and not _wrong_excludes(record, objects)
  return Verdict(not reasons, strict, _score(clauses), tuple(reasons))


def _counted(record: dict, detections: Sequence[Detection], thresholds: Thresholds) -> _Objects:
  """Returns the objects that count, by class."""
  counting = record["tag"] == "counting"
  least = thresholds.counting_confidence if counting else thresholds.confidence
  found: dict[str, list[Detection]] = {}
  for detection in sorted(detections, key=lambda one: -one.confidence):
    same = found.setdefault(detection.class_name, [])
    if detection.confidence > least and len(same) < thresholds.max_objects:
      same.append(detection)
  return found


def _wrong_items(include: Sequence[dict], objects: _Objects, thresholds: Thresholds) -> list[str]:
  """Returns what is wrong with the include items by the official rules, at most one reason an item."""
  reasons, groups = [], []
  for item in include:
    group = objects.get(item["class"], [])[: item["count"]]
    reason = _wrong_count(item, group) or _wrong_color(item, group)
    reason = reason or _wrong_position(item, group, include, groups, thresholds)
    groups.append(None if reason else group)
    reasons += [reason] if reason else []
  return reasons


def _wrong_count(item: dict, group: Sequence[Detection]) -> str:
  if len(group) >= item["count"]:
    return ""
  return f"expected at least {item['count']} {item['class']}, found {len(group)}"


def _wrong_color(item: dict, group: Sequence[Detection]) -> str:
  colors = [one.color for one in group]
  if "color" not in item or colors.count(item["color"]) >= item["count"]:
    return ""
  return f"expected {item['count']} {item['color']} {item['class']}, found the colours {colors}"


def _wrong_position(item: dict, group, include: Sequence[dict], groups: Sequence, thresholds: Thresholds) -> str:
  if "position" not in item:
    return ""
  relation, other = item["position"]
  if groups[other] is None:
    return f"there is no {include[other]['class']} for {item['class']} to be {relation}"
  if _all_related(relation, group, groups[other], thresholds):
    return ""
  return f"expected {item['class']} {relation} {include[other]['class']}"


def _wrong_excludes(record: dict, objects: _Objects) -> list[str]:
  found = [(item, len(objects.get(item["class"], []))) for item in record.get("exclude", [])]
  return [
      f"expected fewer than {item['count']} {item['class']}, found {number}"
      for item, number in found if number >= item["count"]
  ]


def _all_related(relation: str, group: Sequence[Detection], others: Sequence[Detection], thresholds) -> bool:
  return all(relation in relations(a.box, b.box, thresholds.position) for a in group for b in others)


def relations(a: Sequence[float], b: Sequence[float], threshold: float) -> set[str]:
  """Returns the relations of box a to box b (x0, y0, x1, y1).

  With d the offset of a's centre from b's: r = sign(d) max(|d| - threshold (size a + size b), 0) / |d|₂
  per axis; there is none if r is all but 0 on both axes, else those along which r is beyond 0.5.
  """
  offset = [(a[k] + a[k + 2] - b[k] - b[k + 2]) / 2 for k in (0, 1)]
  sizes = [abs(a[k + 2] - a[k]) + abs(b[k + 2] - b[k]) for k in (0, 1)]
  shrunk = [math.copysign(max(abs(d) - threshold * size, 0.0), d) for d, size in zip(offset, sizes)]
  if all(abs(r) < 1e-3 for r in shrunk):
    return set()
  x, y = (r / math.hypot(*offset) for r in shrunk)
  holds = dict(zip(RELATIONS, (x < -0.5, x > 0.5, y < -0.5, y > 0.5)))
  return {relation for relation, there in holds.items() if there}


def _clauses(item: dict, include: Sequence[dict], objects: _Objects, thresholds: Thresholds) -> list[float]:
  """Returns how well each clause of an item is met, in [0, 1]: count[, colour][, relation].

  Items of one class, or of one class and colour, are counted together.
  """
  same = [other for other in include if other["class"] == item["class"]]
  found = [_closeness(sum(other["count"] for other in same), len(objects.get(item["class"], [])))]
  if "color" in item:
    need = sum(other["count"] for other in same if other.get("color") == item["color"])
    found.append(_closeness(need, len(_fitting(item, objects))))
  if "position" in item:
    relation, other = item["position"]
    group, others = (_fitting(one, objects)[: one["count"]] for one in (item, include[other]))
    there = len(group) == item["count"] and len(others) == include[other]["count"]
    found.append(float(there and _all_related(relation, group, others, thresholds)))
  return found


def _fitting(item: dict, objects: _Objects) -> list[Detection]:
  """Returns the objects of an item's class, and of its colour if it names one."""
  return [one for one in objects.get(item["class"], []) if item.get("color") in (None, one.color)]


def _closeness(need: int, found: int) -> float:
  """Returns max(0, 1 - |need - found| / need)."""
  return max(0.0, 1 - abs(need - found) / need)


def _score(clauses: Sequence[Sequence[float]]) -> float:
  """Returns the mean over items of the mean of an item's clauses.

  So a right pair in the wrong relation earns 0.75, about as much as in the reference, whose count
  clause however has no lower bound (-14 was possible).
  """
  return sum(sum(item) / len(item) for item in clauses) / len(clauses)

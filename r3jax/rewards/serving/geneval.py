"""GenEval's rules on detected objects (arXiv 2310.11513), in plain Python floats of 64 bits.

The result has three numbers, and all are logged:
- `correct`: the official verdict. For an item that asks for `count` objects the official code takes
  the most confident `count` of its class and looks at no others: all of them must have the item's
  colour, and each must stand in its relation to each of those taken for the other item, which must
  itself be right. An exclude counts all objects of its class: there may be fewer than its count.
- `strict`: every class has exactly as many objects as the items ask for together, every colour too,
  relations and excludes hold. It implies `correct` where the items name different classes. Items of
  one class are officially judged by the same most confident objects, so that no image is `correct`
  for a red and a blue cup; GenEval has no such prompt.
- `score`: shaped, in [0, 1], and 1 exactly where `strict`; see `_score`.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math

from r3jax.data import records
from r3jax.data.generators import geneval as generator

# x0, y0, x1, y1 in pixels.
Box = tuple[float, float, float, float]

# Boxes whose shrunk offset is below so many pixels on both axes stand in no relation.
_LEAST_OFFSET = 1e-3


@dataclasses.dataclass(frozen=True)
class Detection:
  """An object that a detector found in an image.

  Attributes:
    class_name: its class in GenEval's words.
    confidence: in [0, 1].
    box: x0, y0, x1, y1 in pixels.
    color: the colour classifier's answer for the crop; None if it was not asked.
  """

  class_name: str
  confidence: float
  box: Box
  color: str | None = None


@dataclasses.dataclass(frozen=True)
class Thresholds:
  """What counts as an object and as a relation; the defaults are the official ones.

  Attributes:
    confidence: an object must be more confident than this.
    counting_confidence: the same for prompts of the tag "counting".
    max_objects: of a class so many objects count, the most confident first.
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


OFFICIAL = Thresholds()


@dataclasses.dataclass(frozen=True)
class Verdict:
  """The judgement of an image.

  Attributes:
    correct, strict, score: see the module's docstring.
    reasons: what is wrong by the official rules; empty if correct.
  """

  correct: bool
  strict: bool
  score: float
  reasons: tuple[str, ...]


# Objects by class, the most confident first.
_Objects = Mapping[str, Sequence[Detection]]


def check_prompt(prompt: records.Prompt) -> None:
  """Checks that the rules can judge images of a prompt.

  Raises:
    ValueError: the prompt has no include items, an item asks for what only a judge can see, a
      relation is unknown or does not point to an earlier item, or an exclude forbids what the
      include items ask for.
  """
  if not prompt.include:
    raise ValueError(
      f"GenEval's rules need a prompt with include items; {prompt.text!r} has none"
    )
  for index, item in enumerate(prompt.include):
    _check_item(item, index)
  for index, item in enumerate(prompt.exclude):
    needed = _total_count(_of_class(item.class_name, prompt.include))
    if item.count <= needed:
      raise ValueError(
        f"the count of exclude[{index}] must be more than the {needed} "
        f"{item.class_name} asked for; got {item.count}"
      )


def _check_item(item: records.Expectation, index: int) -> None:
  """Raises ValueError where the rules cannot judge an include item."""
  # Of GenEval++: these need a vision-language judge.
  not_judged = [
    name for name in ("region", "size") if getattr(item, name) is not None
  ]
  if not_judged:
    raise ValueError(
      f"GenEval's rules do not know {not_judged} of include[{index}]; use a judge"
    )
  if item.position is None:
    return
  relation, other = item.position
  if relation not in generator.RELATIONS:
    raise ValueError(
      f"the relation of include[{index}] must be one of "
      f"{list(generator.RELATIONS)}; got {relation!r}"
    )
  # The official code has not judged later items yet.
  if not 0 <= other < index:
    raise ValueError(
      f"the position of include[{index}] must point to an item before it; "
      f"got {other}"
    )


def judge(
  prompt: records.Prompt,
  detections: Sequence[Detection],
  thresholds: Thresholds = OFFICIAL,
) -> Verdict:
  """Judges an image by the objects that were detected in it.

  Args:
    prompt: a prompt that `check_prompt` accepts.
    detections: the objects of the image; classes that the prompt does not name do not matter. Of
      equally confident ones the first comes first (officially an unstable sort decides).
    thresholds: what counts.
  """
  objects = _counted_objects(prompt, detections, thresholds)
  broken_excludes = [
    item
    for item in prompt.exclude
    if len(_objects_of(item, objects)) >= item.count
  ]
  # The official rules: items one after the other, then excludes.
  reasons = _wrong_items(prompt.include, objects, thresholds)
  for item in broken_excludes:
    count = len(_objects_of(item, objects))
    reasons.append(
      f"expected fewer than {item.count} {item.class_name}, found {count}"
    )
  # The shaped score: how well each clause of each item is met.
  clauses = [
    _clauses(item, prompt.include, objects, thresholds)
    for item in prompt.include
  ]
  is_perfect = all(min(item_clauses) == 1 for item_clauses in clauses)
  unnamed = [
    item
    for item in broken_excludes
    if not _of_class(item.class_name, prompt.include)
  ]
  return Verdict(
    correct=not reasons,
    strict=is_perfect and not broken_excludes,
    score=_score(clauses, len(unnamed)),
    reasons=tuple(reasons),
  )


def _of_class(
  class_name: str, items: Sequence[records.Expectation]
) -> list[records.Expectation]:
  """Returns the items of a class."""
  return [item for item in items if item.class_name == class_name]


def _total_count(items: Sequence[records.Expectation]) -> int:
  """Returns the number of objects that items ask for together."""
  return sum(item.count for item in items)


def _counted_objects(
  prompt: records.Prompt,
  detections: Sequence[Detection],
  thresholds: Thresholds,
) -> _Objects:
  """Returns the objects that count, by class."""
  threshold = thresholds.confidence
  if prompt.tag == "counting":
    threshold = thresholds.counting_confidence
  confident = [
    detection for detection in detections if detection.confidence > threshold
  ]
  # A stable sort: of equally confident objects the first stays the first.
  confident.sort(key=lambda detection: -detection.confidence)
  objects: dict[str, list[Detection]] = {}
  for detection in confident:
    same_class = objects.setdefault(detection.class_name, [])
    if len(same_class) < thresholds.max_objects:
      same_class.append(detection)
  return objects


def _objects_of(
  item: records.Expectation, objects: _Objects
) -> Sequence[Detection]:
  """Returns the objects of an item's class."""
  return objects.get(item.class_name, ())


def _wrong_items(
  include: Sequence[records.Expectation],
  objects: _Objects,
  thresholds: Thresholds,
) -> list[str]:
  """Returns what is wrong with the items by the official rules, at most one reason an item."""
  reasons = []
  # The objects taken for each item so far, None where the item is wrong.
  matched: list[Sequence[Detection] | None] = []
  for item in include:
    taken = _objects_of(item, objects)[: item.count]
    reason = _wrong_count(item, taken) or _wrong_color(item, taken)
    if item.position is not None and not reason:
      _, other = item.position
      reason = _wrong_position(
        item, taken, include[other], matched[other], thresholds
      )
    if reason:
      reasons.append(reason)
    matched.append(None if reason else taken)
  return reasons


def _wrong_count(item: records.Expectation, taken: Sequence[Detection]) -> str:
  """Returns how many objects there are where they are too few, else ""."""
  if len(taken) >= item.count:
    return ""
  return f"expected at least {item.count} {item.class_name}, found {len(taken)}"


def _wrong_color(item: records.Expectation, taken: Sequence[Detection]) -> str:
  """Returns the objects' colours where too few have the item's, else ""."""
  colors = [detection.color for detection in taken]
  if item.color is None or colors.count(item.color) >= item.count:
    return ""
  return f"expected {item.count} {item.color} {item.class_name}, found the colours {colors}"


def _wrong_position(
  item: records.Expectation,
  taken: Sequence[Detection],
  other: records.Expectation,
  others: Sequence[Detection] | None,
  thresholds: Thresholds,
) -> str:
  """Returns the relation of the first pair that is not in the item's relation, else "".

  Args:
    item: an item with a position.
    taken: the objects taken for it.
    other: the item that it is related to.
    others: the objects taken for that item; None where it is wrong.
    thresholds: what counts as a relation.
  """
  relation, _ = item.position
  if others is None:
    return (
      f"there is no {other.class_name} for {item.class_name} to be {relation}"
    )
  for pair_relations in _pair_relations(taken, others, thresholds):
    if relation not in pair_relations:
      actual = " and ".join(sorted(pair_relations)) or "no relation"
      return f"expected {item.class_name} {relation} {other.class_name}, found {actual}"
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
  offsets = []
  shrunk = []
  for axis in (0, 1):
    a_low, a_high = a[axis], a[axis + 2]
    b_low, b_high = b[axis], b[axis + 2]
    offset = (a_low + a_high - b_low - b_high) / 2
    sizes = abs(a_high - a_low) + abs(b_high - b_low)
    length = max(abs(offset) - threshold * sizes, 0.0)
    offsets.append(offset)
    shrunk.append(math.copysign(length, offset))
  if all(abs(length) < _LEAST_OFFSET for length in shrunk):
    return set()
  distance = math.hypot(*offsets)
  x = shrunk[0] / distance
  y = shrunk[1] / distance
  holds = (x < -0.5, x > 0.5, y < -0.5, y > 0.5)  # in the order of RELATIONS
  return {
    relation
    for relation, is_true in zip(generator.RELATIONS, holds, strict=True)
    if is_true
  }


def _clauses(
  item: records.Expectation,
  include: Sequence[records.Expectation],
  objects: _Objects,
  thresholds: Thresholds,
) -> list[float]:
  """Returns how well each clause of an item is met, in [0, 1]: count[, colour][, relation].

  Items of one class, or of one class and colour, are counted together. A relation is one between
  objects of the items' colours: 1 if it holds for every pair of the most confident ones.
  """
  same_class = _of_class(item.class_name, include)
  count = len(_objects_of(item, objects))
  clauses = [_closeness(_total_count(same_class), count)]
  if item.color is not None:
    same_color = [other for other in same_class if other.color == item.color]
    colored_count = len(_matching_color(item, objects))
    clauses.append(_closeness(_total_count(same_color), colored_count))
  if item.position is not None:
    relation, other_index = item.position
    other = include[other_index]
    taken = _matching_color(item, objects)[: item.count]
    others = _matching_color(other, objects)[: other.count]
    enough = len(taken) == item.count and len(others) == other.count
    holds = all(
      relation in pair_relations
      for pair_relations in _pair_relations(taken, others, thresholds)
    )
    clauses.append(float(enough and holds))
  return clauses


def _matching_color(
  item: records.Expectation, objects: _Objects
) -> list[Detection]:
  """Returns the objects of an item's class, and of its colour if it names one."""
  return [
    detection
    for detection in _objects_of(item, objects)
    if item.color in (None, detection.color)
  ]


def _closeness(needed: int, count: int) -> float:
  """Returns max(0, 1 - |needed - count| / needed)."""
  return max(0.0, 1 - abs(needed - count) / needed)


def _score(clauses: Sequence[Sequence[float]], num_unnamed: int) -> float:
  """Returns the mean over items of the mean of an item's clauses, divided by 1 + num_unnamed.

  A right pair in the wrong relation scores (1 + (1 + 0) / 2) / 2 = 0.75. So it does in the
  reference, though there by adding a 1 after the 0 of the failed relation (of four clauses three
  are met); its count clause has no lower bound either: 16 objects instead of one score -14.

  Args:
    clauses: those of every item.
    num_unnamed: the number of broken excludes whose class no item names. Other excludes are covered
      by the count clause: the class has as many objects as asked for, or the clause is below 1.
  """
  item_scores = [
    sum(item_clauses) / len(item_clauses) for item_clauses in clauses
  ]
  return sum(item_scores) / len(item_scores) / (1 + num_unnamed)

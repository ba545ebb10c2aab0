"""Finds training prompts that are test prompts too, and drops them.

A prompt occurs in the test set by
  text: as it is;
  folded: with case, the articles a, an and the, spacing and punctuation left out;
  include: with another text that asks for the same, namely the same `include` items in any order
    or, of TIIF's, the same questions with the same answers in any order.
"""

import collections
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
import dataclasses
import json
import unicodedata

KINDS = ("text", "folded", "include")
_ARTICLES = ("a", "an", "the")


@dataclasses.dataclass(frozen=True)
class TagOverlap:
  """How many training prompts of a tag are in the test set.

  Attributes:
    total: prompts of the tag before any was dropped.
    text, folded, include: of them those in the test set, by the first kind that applies.
    dropped: those that were dropped.
    kept: those that were kept although they are in the test set.
  """

  total: int
  text: int
  folded: int
  include: int
  dropped: int
  kept: int


@dataclasses.dataclass(frozen=True)
class Contamination:
  """What `clean` found and did.

  Attributes:
    tags: the overlap of every tag of the training set, in its order.
  """

  tags: Mapping[str, TagOverlap]

  @property
  def contaminated(self) -> bool:
    """Whether training prompts that are in the test set were kept."""
    return any(overlap.kept for overlap in self.tags.values())

  @property
  def vanished(self) -> tuple[str, ...]:
    """The tags of which no training prompt is left."""
    return tuple(
      tag
      for tag, overlap in self.tags.items()
      if overlap.dropped == overlap.total
    )

  def to_json(self) -> dict:
    """Returns what a run's summary says of it."""
    tags = {
      tag: dataclasses.asdict(overlap) for tag, overlap in self.tags.items()
    }
    return {
      "contaminated": self.contaminated,
      "vanished": list(self.vanished),
      "tags": tags,
    }

  def describe(self) -> str:
    """Returns one line per tag."""
    return "\n".join(
      self._line(tag, overlap) for tag, overlap in self.tags.items()
    )

  def _line(self, tag: str, overlap: TagOverlap) -> str:
    kinds = ", ".join(f"{getattr(overlap, kind)} by {kind}" for kind in KINDS)
    end = "; none is left" if tag in self.vanished else ""
    return (
      f"{tag}: of {overlap.total} training prompts {overlap.dropped + overlap.kept} are in "
      f"the test set ({kinds}): {overlap.dropped} dropped, {overlap.kept} kept{end}"
    )


def find(train: Sequence[dict], tests: Sequence[dict]) -> list[str | None]:
  """Returns how each training record occurs in the test set: the first of KINDS, or None.

  Args:
    train: records as `PromptRecord.to_json` gives them.
    tests: records of the same kind.
  """
  known = {
    kind: {key(record) for record in tests} for kind, key in _KEYS.items()
  }
  return [
    next(
      (kind for kind, key in _KEYS.items() if key(record) in known[kind]), None
    )
    for record in train
  ]


@dataclasses.dataclass(frozen=True)
class Leaked:
  """Which prompts of an evaluation a model was trained on.

  Attributes:
    tags: tag -> how many different ones.
    complete: whether all is known that the model was trained on; else there may be more.
  """

  tags: Mapping[str, int]
  complete: bool

  @property
  def contaminated(self) -> bool:
    """Whether there is any."""
    return any(self.tags.values())

  def notes(self) -> list[str]:
    """Returns what must stand beside every number of such an evaluation."""
    by_tag = ", ".join(
      f"{tag} {number}" for tag, number in self.tags.items() if number
    )
    known = f"CONTAMINATED: the model was trained on {sum(self.tags.values())} of these prompts ({by_tag})."
    unknown = "What the model was trained on is not known in full: prompts that are evaluated here may be among it."
    return [known] * self.contaminated + [unknown] * (not self.complete)


def leaked(
  train: Sequence[dict], tests: Sequence[dict], complete: bool
) -> Leaked:
  """Returns which test records a model was trained on, by any of KINDS.

  Args:
    train: records that it was trained on, as far as they are known.
    tests: records; those with the same prompt count once.
    complete: whether `train` is all.
  """
  distinct = list({record["prompt"]: record for record in tests}.values())
  found = collections.Counter(
    record["tag"]
    for record, kind in zip(distinct, find(distinct, train))
    if kind
  )
  return Leaked(
    {
      tag: found[tag]
      for tag in dict.fromkeys(record["tag"] for record in tests)
    },
    complete,
  )


def clean(
  train: Sequence[dict], tests: Sequence[dict], keep_tags: Collection[str] = ()
) -> tuple[list[dict], Contamination]:
  """Drops the training records that occur in the test set.

  Args:
    train: the training records, see `find`.
    tests: the test records.
    keep_tags: tags whose records are kept although they are in the test set.

  Returns:
    The records that are left, in their order, and what was found.

  Raises:
    ValueError: if no record would be left, or a tag to keep is not in the training set.
  """
  tags = list(dict.fromkeys(record["tag"] for record in train))
  if unknown := sorted(set(keep_tags) - set(tags)):
    raise ValueError(
      f"keep_tags must be tags of the training set, {tags}; got {unknown}"
    )
  found = find(train, tests)
  kept = [
    record
    for record, kind in zip(train, found)
    if kind is None or record["tag"] in keep_tags
  ]
  if train and not kept:
    raise ValueError(
      f"all {len(train)} training prompts (tags {tags}) are in the test set, and none may be "
      "trained on; keep_tags keeps the prompts of a tag, and the run is then called contaminated"
    )
  counts = collections.Counter(
    (record["tag"], kind) for record, kind in zip(train, found)
  )
  return kept, Contamination(
    {tag: _overlap(tag, counts, tag in keep_tags) for tag in tags}
  )


def _overlap(tag: str, counts: collections.Counter, keep: bool) -> TagOverlap:
  """Returns the overlap of a tag from the numbers of records by (tag, kind)."""
  by_kind = {kind: counts[tag, kind] for kind in KINDS}
  overlapping = sum(by_kind.values())
  return TagOverlap(
    total=overlapping + counts[tag, None],
    **by_kind,
    dropped=0 if keep else overlapping,
    kept=overlapping if keep else 0,
  )


def _text(record: dict) -> str:
  return record["prompt"]


def _folded(record: dict) -> str:
  """Returns the prompt's words without case, articles and punctuation."""
  plain = "".join(
    " " if unicodedata.category(character).startswith("P") else character
    for character in record["prompt"].casefold()
  )
  words = [word for word in plain.split() if word not in _ARTICLES]
  # Of "?!" and "..." nothing would be left to compare.
  return " ".join(words) or record["prompt"]


def _asked(record: dict) -> Hashable:
  """Returns what is asked for, free of any order."""
  if "questions" in record:
    # One question alone ("Is the image in ... style?") does not say what the prompt asks for.
    asked = frozenset(map(tuple, record["questions"]))
    return asked if len(asked) > 1 else record["prompt"]
  return tuple(sorted(_resolved(record["include"])))


def _resolved(items: Sequence[dict]) -> list[str]:
  """Returns each item as text, with the other item of its position in place of an index."""
  bare = [
    {key: value for key, value in item.items() if key != "position"}
    for item in items
  ]
  texts = []
  for item, own in zip(items, bare):
    relation, index = item.get("position", (None, None))
    texts.append(
      json.dumps([own, relation, relation and bare[index]], sort_keys=True)
    )
  return texts


_KEYS: Mapping[str, Callable[[dict], Hashable]] = {
  "text": _text,
  "folded": _folded,
  "include": _asked,
}

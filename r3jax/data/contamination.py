"""Finds training prompts that are test prompts too, and drops them.

A prompt occurs in the test set by
  text: its text is a test prompt's text;
  folded: the texts agree without case, the articles a, an and the, spacing, punctuation, and
    differences of Unicode that nobody sees (the forms NFC and NFD, characters of full width,
    zero-width and other formatting characters);
  include: a test prompt with another text asks for the same, namely the same `include` items in any
    order, the same inscription as `inscriptions.comparable` compares it or, for TIIF, the same
    questions with the same answers in any order.
"""

import collections
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
import dataclasses
import json
import unicodedata

from r3jax.data import inscriptions
from r3jax.data import records
from r3jax.files import texts

KINDS = ("text", "folded", "include")
_ARTICLES = ("a", "an", "the")


@dataclasses.dataclass(frozen=True)
class TagOverlap:
  """How many training prompts of a tag are in the test set.

  Attributes:
    total: prompts of the tag before any was dropped.
    text, folded, include: those of them that are in the test set, by the first kind that applies.
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
  """The overlap of a training set with the test set, and what was done about it.

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
    """Returns the entry of a run's summary."""
    tags = {
      tag: dataclasses.asdict(overlap) for tag, overlap in self.tags.items()
    }
    return {
      "contaminated": self.contaminated,
      "vanished": list(self.vanished),
      "tags": tags,
    }

  def describe(self) -> str:
    """Returns one line of text per tag."""
    lines = []
    for tag, overlap in self.tags.items():
      overlapping = overlap.dropped + overlap.kept
      line = (
        f"{tag}: of {overlap.total} training prompts {overlapping} are in the test set "
        f"({overlap.text} by text, {overlap.folded} by folded, {overlap.include} by include): "
        f"{overlap.dropped} dropped, {overlap.kept} kept"
      )
      if tag in self.vanished:
        line += "; none is left"
      lines.append(line)
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Leaked:
  """The prompts of an evaluation that a model was trained on.

  Attributes:
    tags: tag -> the number of different prompts.
    complete: whether everything is known that the model was trained on; otherwise there may be
      more.
  """

  tags: Mapping[str, int]
  complete: bool

  @property
  def contaminated(self) -> bool:
    """Whether there is any."""
    return any(self.tags.values())

  def notes(self) -> list[str]:
    """Returns the sentences that must stand beside every number of such an evaluation."""
    notes = []
    if self.contaminated:
      by_tag = ", ".join(
        f"{tag} {count}" for tag, count in self.tags.items() if count
      )
      notes.append(
        f"CONTAMINATED: the model was trained on {sum(self.tags.values())} of these prompts "
        f"({by_tag})."
      )
    if not self.complete:
      notes.append(
        "What the model was trained on is not known in full: prompts that are evaluated here may "
        "be among it."
      )
    return notes


def occurrences(
  train: Sequence[records.Prompt], tests: Sequence[records.Prompt]
) -> list[str | None]:
  """Returns how each training prompt occurs in the test set: the first of KINDS, or None."""
  test_keys = {}
  for kind, key_of in _KEYS.items():
    test_keys[kind] = {key_of(prompt) for prompt in tests}

  # Hashing the tests' keys makes this linear in the two sizes.
  def kind_of(prompt: records.Prompt) -> str | None:
    for kind, key_of in _KEYS.items():
      if key_of(prompt) in test_keys[kind]:
        return kind
    return None

  return [kind_of(prompt) for prompt in train]


def leaked(
  train: Sequence[records.Prompt],
  tests: Sequence[records.Prompt],
  complete: bool,
) -> Leaked:
  """Returns the test prompts that a model was trained on, by any of KINDS.

  Args:
    train: the prompts that it was trained on, as far as they are known.
    tests: the test prompts; those with the same text count once.
    complete: whether `train` is everything that it was trained on.
  """
  distinct = list({prompt.text: prompt for prompt in tests}.values())
  kinds = occurrences(distinct, train)
  counts = dict.fromkeys((prompt.tag for prompt in tests), 0)
  for prompt, kind in zip(distinct, kinds, strict=True):
    if kind is not None:
      counts[prompt.tag] += 1
  return Leaked(counts, complete)


def clean(
  train: Sequence[records.Prompt],
  tests: Sequence[records.Prompt],
  keep_tags: Collection[str] = (),
) -> tuple[list[records.Prompt], Contamination]:
  """Drops the training prompts that occur in the test set.

  Args:
    train: the training prompts.
    tests: the test prompts.
    keep_tags: tags whose prompts are kept although they are in the test set.

  Returns:
    The prompts that are left, in their order, and the overlap by tag.

  Raises:
    ValueError: no prompt would be left, or a tag to keep is not in the training set.
  """
  # A dict keeps the order of the training set; a set would not.
  tags = list(dict.fromkeys(prompt.tag for prompt in train))
  unknown = sorted(set(keep_tags) - set(tags))
  if unknown:
    raise ValueError(
      f"keep_tags must be tags of the training set, {tags}; got {unknown}"
    )
  kinds = occurrences(train, tests)
  remaining = []
  counts = collections.Counter()
  for prompt, kind in zip(train, kinds, strict=True):
    counts[prompt.tag, kind] += 1
    if kind is None or prompt.tag in keep_tags:
      remaining.append(prompt)
  if train and not remaining:
    raise ValueError(
      f"all {len(train)} training prompts (tags {tags}) are in the test set, and none may be "
      "trained on; keep_tags keeps the prompts of a tag, and the run is then called contaminated"
    )
  overlaps = {tag: _overlap(tag, counts, tag in keep_tags) for tag in tags}
  return remaining, Contamination(overlaps)


def _overlap(tag: str, counts: collections.Counter, keep: bool) -> TagOverlap:
  """Returns the overlap of a tag from the numbers of prompts by (tag, kind)."""
  by_kind = {kind: counts[tag, kind] for kind in KINDS}
  overlapping = sum(by_kind.values())
  kept = overlapping if keep else 0
  return TagOverlap(
    total=overlapping + counts[tag, None],
    **by_kind,
    dropped=overlapping - kept,
    kept=kept,
  )


def _text(prompt: records.Prompt) -> str:
  return prompt.text


def _folded(prompt: records.Prompt) -> str:
  """Returns the prompt's words without case, articles and punctuation."""
  text = texts.canonical(prompt.text)
  # Unicode's categories Pc, Pd, ..., so that quotes and dashes of every language count.
  punctuation = {
    character
    for character in text
    if unicodedata.category(character).startswith("P")
  }
  for character in punctuation:
    text = text.replace(character, " ")
  words = [word for word in text.split() if word not in _ARTICLES]
  # "?!" and "..." would have nothing left to compare.
  return " ".join(words) or prompt.text


def _content(prompt: records.Prompt) -> Hashable:
  """Returns what a prompt asks for, free of any order."""
  if prompt.questions:
    questions = frozenset(
      (texts.canonical(question.text), question.answer)
      for question in prompt.questions
    )
    # One question alone ("Is the image in ... style?") does not say what the prompt asks for.
    return questions if len(questions) > 1 else prompt.text
  if prompt.inscription is not None:
    # A tuple of its own kind: no text of a prompt is equal to it.
    return ("inscription", inscriptions.comparable(prompt.inscription))
  if not prompt.include:
    return prompt.text
  return tuple(sorted(_resolved(prompt.include)))


def _resolved(items: Sequence[records.Expectation]) -> list[str]:
  """Returns each item as text, with the other item of its position in place of an index."""
  # An index depends on the order of the items; the item that it points to does not.
  without_position = [
    dataclasses.replace(item, position=None).to_json() for item in items
  ]
  descriptions = []
  for item, own in zip(items, without_position, strict=True):
    if item.position is None:
      resolved = [own, None, None]
    else:
      relation, index = item.position
      resolved = [own, relation, without_position[index]]
    text = json.dumps(resolved, sort_keys=True, ensure_ascii=False)
    descriptions.append(texts.canonical(text))
  return descriptions


_KEYS: Mapping[str, Callable[[records.Prompt], Hashable]] = {
  "text": _text,
  "folded": _folded,
  "include": _content,
}

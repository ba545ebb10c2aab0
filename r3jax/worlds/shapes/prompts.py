"""Enumerates the prompts of the embedded world as GenEval records, split into train and held-out.

A record is a `data.records.Prompt` with the fields of GenEval's own files: an include item has a class,
a count, perhaps a color or a position (relation, index of the other item); of the class of an exclude
item fewer than its count may be there.

A *combination* is what a prompt asks for, free of wording and of any order without meaning: "a
heart left of a bow" and "a bow right of a heart" are one. In every tag about a third of the
combinations is held out; a split holds all the prompts of its combinations.
"""

from collections.abc import Iterator
import dataclasses
import functools
import itertools

import numpy as np

from r3jax.data import records
from r3jax.worlds.shapes import scenes

TAGS = (
  "single_object",
  "two_object",
  "counting",
  "colors",
  "position",
  "color_attr",
)
RELATIONS = ("left of", "right of", "above", "below")
COUNTS = (2, 3, 4)
NUMBER_WORDS = {2: "two", 3: "three", 4: "four"}
PLURALS = {
  "square": "squares",
  "ring": "rings",
  "cross": "crosses",
  "spool": "spools",
  "bow": "bows",
  "heart": "hearts",
}

Combination = tuple[int, ...]


def train_records() -> list[records.Prompt]:
  """Returns the records of every combination that is not held out, grouped by tag."""
  return [
    record
    for combination, record in _all_records()
    if not _is_heldout(combination)
  ]


def heldout_records() -> list[records.Prompt]:
  """Returns the records of every held-out combination, grouped by tag."""
  return [
    record for combination, record in _all_records() if _is_heldout(combination)
  ]


def scene_for(record: records.Prompt, rng: np.random.Generator) -> scenes.Scene:
  """Draws a scene that holds what `record` asks for and nothing else.

  Colours are free where the record names none. For a relation the two objects differ more along
  its axis than along the other, so that jitter cannot break it and only one relation holds.

  Args:
    record: one of this module's records: at most one item has a position, relative to item 0.
    rng: source of colours, cells, sizes and offsets.

  Returns:
    A numpy Scene of arrays [9].
  """
  kinds = []
  for item in record.include:
    for _ in range(item.count):
      color = (
        scenes.COLORS.index(item.color)
        if item.color is not None
        else int(rng.integers(len(scenes.COLORS)))
      )
      kinds.append((scenes.SHAPES.index(item.class_name), color))
  positions = [
    item.position for item in record.include if item.position is not None
  ]
  if positions:
    legal = _cell_pairs(positions[0][0])
    cells = legal[rng.integers(len(legal))]
  else:
    cells = rng.permutation(len(scenes.CELLS))[: len(kinds)]
  objects = [
    (shape, color, int(cell)) for (shape, color), cell in zip(kinds, cells)
  ]
  return scenes.place(objects, rng)


def _is_heldout(combination: Combination) -> bool:
  """Returns the split: a third of each tag, with every class, colour and count on both sides."""
  return sum(combination) % 3 == 0


def _all_records() -> Iterator[tuple[Combination, records.Prompt]]:
  """Yields every prompt's combination (indices and counts) and record, tag by tag."""
  classes, colors = range(len(scenes.SHAPES)), range(len(scenes.COLORS))
  for a in classes:
    yield (a,), _record("single_object", [_item(a)])
  for a, b in itertools.permutations(classes, 2):
    yield tuple(sorted((a, b))), _record("two_object", [_item(a), _item(b)])
  for a, count in itertools.product(classes, COUNTS):
    exclude = records.Expectation(scenes.SHAPES[a], count + 1)
    record = _record("counting", [_item(a, count=count)])
    yield (a, count), dataclasses.replace(record, exclude=(exclude,))
  for a, color in itertools.product(classes, colors):
    yield (a, color), _record("colors", [_item(a, color)])
  for (a, b), relation in itertools.product(
    itertools.permutations(classes, 2), RELATIONS
  ):
    yield (
      _relation_combination(a, relation, b),
      _relation_record(a, relation, b),
    )
  for (a, b), (x, y) in itertools.product(
    itertools.permutations(classes, 2), itertools.permutations(colors, 2)
  ):
    combination = sum(sorted(((a, x), (b, y))), ())
    yield combination, _record("color_attr", [_item(a, x), _item(b, y)])


def _item(
  shape: int, color: int | None = None, count: int = 1
) -> records.Expectation:
  """Returns an include item."""
  color_name = None if color is None else scenes.COLORS[color]
  return records.Expectation(scenes.SHAPES[shape], count, color_name)


def _record(tag: str, items: list[records.Expectation]) -> records.Prompt:
  """Returns the record of a list of items."""
  prompt = "a photo of " + " and ".join(_phrase(item) for item in items)
  return records.Prompt(tag, prompt, tuple(items))


def _phrase(item: records.Expectation) -> str:
  """Returns an item in words: "a heart", "a red heart", "three hearts"."""
  if item.count > 1:
    return f"{NUMBER_WORDS[item.count]} {PLURALS[item.class_name]}"
  words = ["a", item.color, item.class_name]
  return " ".join(word for word in words if word)


def _relation_record(a: int, relation: str, b: int) -> records.Prompt:
  """Returns the record of "a photo of a {a} {relation} a {b}"; as in GenEval, b is item 0."""
  related = dataclasses.replace(_item(a), position=(relation, 0))
  items = (_item(b), related)
  prompt = f"a photo of {_phrase(items[1])} {relation} {_phrase(items[0])}"
  return records.Prompt("position", prompt, items)


def _relation_combination(a: int, relation: str, b: int) -> Combination:
  """Returns (upper or left class, axis, the other class); the axis is 0 or 2 in RELATIONS."""
  index = RELATIONS.index(relation)
  return (a, index, b) if index % 2 == 0 else (b, index - 1, a)


@functools.cache
def _cell_pairs(relation: str) -> tuple[tuple[int, int], ...]:
  """Returns the cells (of item 0, of the item that stands in `relation` to it)."""
  index = RELATIONS.index(relation)
  along, sign = ("x", "x", "y", "y")[index], (-1, 1, -1, 1)[index]
  pairs = []
  for base, other in itertools.permutations(range(len(scenes.CELLS)), 2):
    dy, dx = np.subtract(divmod(other, scenes.GRID), divmod(base, scenes.GRID))
    main, cross = (dx, dy) if along == "x" else (dy, dx)
    if main * sign > abs(cross):
      pairs.append((base, other))
  return tuple(pairs)


def by_tag(
  prompts: list[records.Prompt],
) -> tuple[tuple[records.Prompt, ...], ...]:
  """Returns the prompts grouped by tag, in the order of TAGS."""
  groups = {tag: [] for tag in TAGS}
  for prompt in prompts:
    groups[prompt.tag].append(prompt)
  return tuple(tuple(group) for group in groups.values())

"""Enumerates the prompts of the embedded world, split into train and held-out.

They are `data.records.Prompt`s with the fields of GenEval's own files. An include item has a class,
a count, and perhaps a colour or a position (relation, index of the other item). Of the class of an
exclude item there must be fewer than its count.

A *combination* is what a prompt asks for, free of wording and of any order without meaning: "a
heart left of a bow" and "a bow right of a heart" are one. In every tag about a third of the
combinations is held out; a split holds all the prompts of its combinations.
"""

from collections.abc import Iterator, Sequence
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

# Indices and counts, see `_all_records`.
Combination = tuple[int, ...]


def train_records() -> list[records.Prompt]:
  """Returns the prompts of every combination that is not held out, grouped by tag."""
  return [
    record
    for combination, record in _all_records()
    if not _is_heldout(combination)
  ]


def heldout_records() -> list[records.Prompt]:
  """Returns the prompts of every held-out combination, grouped by tag."""
  return [
    record for combination, record in _all_records() if _is_heldout(combination)
  ]


def by_tag(
  prompts: Sequence[records.Prompt],
) -> tuple[tuple[records.Prompt, ...], ...]:
  """Returns the prompts grouped by tag, in the order of TAGS."""
  groups = {tag: [] for tag in TAGS}
  for prompt in prompts:
    groups[prompt.tag].append(prompt)
  return tuple(tuple(group) for group in groups.values())


def scene_for(record: records.Prompt, rng: np.random.Generator) -> scenes.Scene:
  """Draws a scene that holds what a prompt asks for and nothing else.

  Colours are free where the prompt names none. For a relation the two objects differ more along
  its axis than along the other, so that jitter cannot break it and only one relation holds.

  Args:
    record: one of this module's prompts; at most one item has a position, relative to item 0.
    rng: source of colours, cells, sizes and offsets.

  Returns:
    A numpy Scene of arrays [9].
  """
  # (shape, color) of every object
  things = []
  relation = None
  for item in record.include:
    if item.position is not None:
      relation = item.position[0]
    shape = scenes.SHAPES.index(item.class_name)
    for _ in range(item.count):
      if item.color is None:
        color = int(rng.integers(len(scenes.COLORS)))
      else:
        color = scenes.COLORS.index(item.color)
      things.append((shape, color))
  if relation is None:
    cells = rng.permutation(len(scenes.CELLS))[: len(things)]
  else:
    pairs = _cell_pairs(relation)
    cells = pairs[rng.integers(len(pairs))]
  objects = [
    scenes.Object(shape, color, int(cell))
    for (shape, color), cell in zip(things, cells, strict=True)
  ]
  return scenes.place(objects, rng)


@functools.cache
def _cell_pairs(relation: str) -> tuple[tuple[int, int], ...]:
  """Returns the pairs (cell of item 0, cell of the item that stands in `relation` to it)."""
  index = RELATIONS.index(relation)
  is_horizontal = index < 2
  sign = (-1, 1, -1, 1)[index]
  pairs = []
  for base, other in itertools.permutations(range(len(scenes.CELLS)), 2):
    dy, dx = np.subtract(divmod(other, scenes.GRID), divmod(base, scenes.GRID))
    along, across = (dx, dy) if is_horizontal else (dy, dx)
    if along * sign > abs(across):
      pairs.append((base, other))
  return tuple(pairs)


# --- Enumeration ---------------------------------------------------------------------------------


def _is_heldout(combination: Combination) -> bool:
  """Returns the split: a third of each tag, with every class, colour and count on both sides."""
  return sum(combination) % 3 == 0


def _all_records() -> Iterator[tuple[Combination, records.Prompt]]:
  """Yields every prompt with its combination, tag by tag."""
  shapes = range(len(scenes.SHAPES))
  colors = range(len(scenes.COLORS))
  shape_pairs = list(itertools.permutations(shapes, 2))
  color_pairs = list(itertools.permutations(colors, 2))

  for shape in shapes:
    yield (shape,), _record("single_object", _item(shape))

  for a, b in shape_pairs:
    combination = tuple(sorted((a, b)))
    yield combination, _record("two_object", _item(a), _item(b))

  for shape, count in itertools.product(shapes, COUNTS):
    record = _record("counting", _item(shape, count=count))
    one_more = records.Expectation(scenes.SHAPES[shape], count + 1)
    yield (shape, count), dataclasses.replace(record, exclude=(one_more,))

  for shape, color in itertools.product(shapes, colors):
    yield (shape, color), _record("colors", _item(shape, color))

  for (a, b), relation in itertools.product(shape_pairs, RELATIONS):
    combination = _relation_combination(a, relation, b)
    yield combination, _relation_record(a, relation, b)

  for (a, b), (a_color, b_color) in itertools.product(shape_pairs, color_pairs):
    first, second = sorted([(a, a_color), (b, b_color)])
    record = _record("color_attr", _item(a, a_color), _item(b, b_color))
    yield first + second, record


def _item(
  shape: int, color: int | None = None, count: int = 1
) -> records.Expectation:
  """Returns an include item."""
  color_name = None if color is None else scenes.COLORS[color]
  return records.Expectation(scenes.SHAPES[shape], count, color_name)


def _record(tag: str, *items: records.Expectation) -> records.Prompt:
  """Returns the prompt that asks for some items."""
  text = "a photo of " + " and ".join(_phrase(item) for item in items)
  return records.Prompt(tag, text, items)


def _phrase(item: records.Expectation) -> str:
  """Returns an item in words: "a heart", "a red heart", "three hearts"."""
  if item.count > 1:
    return f"{NUMBER_WORDS[item.count]} {PLURALS[item.class_name]}"
  if item.color is None:
    return f"a {item.class_name}"
  return f"a {item.color} {item.class_name}"


def _relation_record(a: int, relation: str, b: int) -> records.Prompt:
  """Returns the prompt "a photo of a {a} {relation} a {b}"; as in GenEval, b is item 0."""
  base = _item(b)
  related = dataclasses.replace(_item(a), position=(relation, 0))
  text = f"a photo of {_phrase(related)} {relation} {_phrase(base)}"
  return records.Prompt("position", text, (base, related))


def _relation_combination(a: int, relation: str, b: int) -> Combination:
  """Returns (left or upper class, axis, the other class); the axis is 0 or 2 in RELATIONS."""
  index = RELATIONS.index(relation)
  if index % 2 == 0:
    return (a, index, b)
  return (b, index - 1, a)

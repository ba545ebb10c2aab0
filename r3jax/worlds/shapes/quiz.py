"""Questions about scenes of the embedded world, one function a kind.

Of the questions with the answer yes or no half are "yes", where a true one can be asked. All are
worded as those that the small model was trained on (`grammar.py`).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

import numpy as np

from r3jax.worlds.shapes import edits
from r3jax.worlds.shapes import grammar
from r3jax.worlds.shapes import prompts
from r3jax.worlds.shapes import scenes

Objects = Sequence[edits.Object]
QuestionAnswer = tuple[str, str]
T = TypeVar("T")


def existence(objects: Objects, rng: np.random.Generator) -> QuestionAnswer:
  """Asks whether there is an object of a colour.

  Where the answer is "no", the object asked for shares its shape or its colour with one of the
  scene, if there is any.
  """
  present = {(shape, color) for shape, color, _ in objects}
  possible = {
    (shape, color)
    for shape in range(len(scenes.SHAPES))
    for color in range(len(scenes.COLORS))
  }
  present_shapes = {shape for shape, _ in present}
  present_colors = {color for _, color in present}
  similar = {
    (shape, color)
    for shape, color in possible - present
    if shape in present_shapes or color in present_colors
  }
  exists = bool(present) and rng.random() < 0.5
  shape, color = _pick(present if exists else similar or possible, rng)
  question = grammar.existence_question(shape, color)
  return question, grammar.yes_or_no(exists)


def count(objects: Objects, rng: np.random.Generator) -> QuestionAnswer:
  """Asks how many objects there are of a shape, which is present two times of three."""
  present: Collection[int] = {shape for shape, _, _ in objects}
  if present and rng.random() < 2 / 3:
    shape = _pick(present, rng)
  else:
    shape = _pick(range(len(scenes.SHAPES)), rng)
  number = grammar.NUMBERS[grammar.count(objects, shape)]
  return grammar.count_question(shape), number


def color(objects: Objects, rng: np.random.Generator) -> QuestionAnswer | None:
  """Asks for the colour of an object; returns None where there is no object."""
  if not objects:
    return None
  shape, color_index, cell = _pick(objects, rng)
  return grammar.color_question(shape, cell), scenes.COLORS[color_index]


def relation(
  objects: Objects, rng: np.random.Generator
) -> QuestionAnswer | None:
  """Asks how two objects stand to each other, each the only one of its shape.

  Returns None where the scene has no two such objects.
  """
  shapes = [shape for shape, _, _ in objects]
  unique = [item for item in objects if shapes.count(item[0]) == 1]
  if len(unique) < 2:
    return None
  base, other = [unique[i] for i in rng.permutation(len(unique))[:2]]
  cells = (base[2], other[2])
  holding = {
    name for name in prompts.RELATIONS if cells in edits.related_cells(name)
  }
  holds = bool(holding) and rng.random() < 0.5
  name = _pick(holding if holds else set(prompts.RELATIONS) - holding, rng)
  question = grammar.relation_question(
    scenes.SHAPES[other[0]], name, scenes.SHAPES[base[0]]
  )
  return question, grammar.yes_or_no(holds)


def _pick(candidates: Collection[T], rng: np.random.Generator) -> T:
  """Draws one of the candidates, whatever the order in which they come."""
  return sorted(candidates)[rng.integers(len(candidates))]


Kind = Callable[[Objects, np.random.Generator], QuestionAnswer | None]
# The place of a kind is part of the seed of its questions, see `worlds.base.Quiz`.
KINDS: Mapping[str, Kind] = {
  "existence": existence,
  "count": count,
  "color": color,
  "relation": relation,
}

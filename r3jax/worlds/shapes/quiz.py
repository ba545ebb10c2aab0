"""Questions about scenes of the embedded world, one of each kind.

Of those that can be answered by yes or no half are "yes" where a true one can be asked.

They are worded as those that the small model was trained on (`worlds/grammar.py`).
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from r3jax.worlds.shapes import edits
from r3jax.worlds.shapes import grammar
from r3jax.worlds.shapes import prompts
from r3jax.worlds.shapes import scenes

Objects = Sequence[edits.Object]
Asked = tuple[str, str]  # question, answer


def existence(objects: Objects, rng: np.random.Generator) -> Asked:
  """Asks whether there is an object of a colour; a "no" shares shape or colour with one that is there."""
  there = {item[:2] for item in objects}
  every = {
    (shape, color)
    for shape in range(len(scenes.SHAPES))
    for color in range(len(scenes.COLORS))
  }
  near = {
    pair
    for pair in every - there
    if any(pair[0] == s or pair[1] == c for s, c in there)
  }
  truth = bool(there) and rng.random() < 0.5
  shape, color = _pick(there if truth else near or every, rng)
  return grammar.existence_question(shape, color), grammar.yes_or_no(truth)


def count(objects: Objects, rng: np.random.Generator) -> Asked:
  """Asks how many there are of a shape, which is there two times of three."""
  there = {item[0] for item in objects}
  shape = _pick(
    there if there and rng.random() < 2 / 3 else range(len(scenes.SHAPES)), rng
  )
  return grammar.count_question(shape), grammar.NUMBERS[
    grammar.count(objects, shape)
  ]


def color(objects: Objects, rng: np.random.Generator) -> Asked | None:
  """Asks for the colour of an object; None where there is none."""
  if not objects:
    return None
  shape, painted, cell = _pick(objects, rng)
  return grammar.color_question(shape, cell), scenes.COLORS[painted]


def relation(objects: Objects, rng: np.random.Generator) -> Asked | None:
  """Asks how two objects stand to each other, whose shapes name them; None where no two are that clear."""
  names = [item[0] for item in objects]
  single = [item for item in objects if names.count(item[0]) == 1]
  if len(single) < 2:
    return None
  base, other = (single[i] for i in rng.permutation(len(single))[:2])
  holds = {
    name
    for name in prompts.RELATIONS
    if (base[2], other[2]) in edits.related_cells(name)
  }
  truth = bool(holds) and rng.random() < 0.5
  name = _pick(holds if truth else set(prompts.RELATIONS) - holds, rng)
  return grammar.relation_question(
    scenes.SHAPES[other[0]], name, scenes.SHAPES[base[0]]
  ), grammar.yes_or_no(truth)


def _pick(among, rng: np.random.Generator):
  return sorted(among)[rng.integers(len(among))]


KINDS: Mapping[str, Callable[[Objects, np.random.Generator], Asked | None]] = {
  "existence": existence,
  "count": count,
  "color": color,
  "relation": relation,
}

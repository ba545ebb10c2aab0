"""Records with scenes of all kinds, and a rule checker that shares no code with the package."""

import collections

from r3jax.data import records
from r3jax.worlds.shapes import edits
from r3jax.worlds.shapes import prompts
from r3jax.worlds.shapes import scenes

RECORDS = prompts.train_records() + prompts.heldout_records()


def prompt_of(obj):
  """Returns the prompt of a JSON object, which need not be complete or valid."""
  include, exclude = (
    tuple(map(records.Expectation.from_json, obj.get(field, ())))
    for field in ("include", "exclude")
  )
  return records.Prompt(
    obj.get("tag", ""), obj.get("prompt", ""), include, exclude
  )


def fulfilled(record, objects):
  """Independent of the package: exact counts, colours, relation, nothing else."""
  classes = collections.Counter(scenes.SHAPES[shape] for shape, _, _ in objects)
  if classes != collections.Counter(
    {item.class_name: item.count for item in record.include}
  ):
    return False
  by_class = {
    scenes.SHAPES[shape]: (scenes.COLORS[color], cell)
    for shape, color, cell in objects
  }
  for item in record.include:
    color, cell = by_class[item.class_name]
    if item.color not in (None, color):
      return False
    if item.position is not None:
      relation, other = item.position
      base = by_class[record.include[other].class_name][1]
      right, down = cell % 3 - base % 3, cell // 3 - base // 3
      along = {
        "left of": -right,
        "right of": right,
        "above": -down,
        "below": down,
      }
      across = down if relation in ("left of", "right of") else right
      if along[relation] <= abs(across):
        return False
  return True


def random_objects(rng, size):
  cells = rng.permutation(9)[:size]
  return [
    (int(rng.integers(6)), int(rng.integers(6)), int(cell)) for cell in cells
  ]


def draw(rng, count):
  """Yields records of every tag with right, flawed, edited, random and empty scenes."""
  by_tag = {tag: [r for r in RECORDS if r.tag == tag] for tag in prompts.TAGS}
  for i in range(count):
    group = by_tag[prompts.TAGS[i % 6]]
    record = group[rng.integers(len(group))]
    right = scenes.objects_of(prompts.scene_for(record, rng))
    match rng.integers(4):
      case 0:
        yield record, right
      case 1:
        yield record, edits.flawed_plan(record, right, rng)
      case 2:
        yield record, edits.apply(edits.random_operations(right, rng, 2), right)
      case 3:
        yield record, random_objects(rng, int(rng.integers(7)))


def objects_in(text):
  """Reads the "color shape cell" triples of a plan or description, wherever they stand."""
  words = text.split()
  objects = []
  for color, shape, cell in zip(words, words[1:], words[2:], strict=False):
    if (
      color in scenes.COLORS and shape in scenes.SHAPES and cell in scenes.CELLS
    ):
      objects.append(
        (
          scenes.SHAPES.index(shape),
          scenes.COLORS.index(color),
          scenes.CELLS.index(cell),
        )
      )
  return objects

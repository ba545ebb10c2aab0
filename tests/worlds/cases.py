"""Records with scenes of all kinds, and a rule checker that shares no code with the package."""

import collections

from r3jax.worlds.shapes import edits
from r3jax.worlds.shapes import prompts
from r3jax.worlds.shapes import scenes

RECORDS = prompts.train_records() + prompts.heldout_records()


def fulfilled(record, objects):
  """Independent of the package: exact counts, colours, relation, nothing else."""
  classes = collections.Counter(scenes.SHAPES[shape] for shape, _, _ in objects)
  if classes != collections.Counter(
    {i["class"]: i["count"] for i in record["include"]}
  ):
    return False
  by_class = {
    scenes.SHAPES[shape]: (scenes.COLORS[color], cell)
    for shape, color, cell in objects
  }
  for item in record["include"]:
    color, cell = by_class[item["class"]]
    if item.get("color", color) != color:
      return False
    if "position" in item:
      base = by_class[record["include"][item["position"][1]]["class"]][1]
      right, down = cell % 3 - base % 3, cell // 3 - base // 3
      along = {
        "left of": -right,
        "right of": right,
        "above": -down,
        "below": down,
      }
      relation = item["position"][0]
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
  by_tag = {
    tag: [r for r in RECORDS if r["tag"] == tag] for tag in prompts.TAGS
  }
  for i in range(count):
    records = by_tag[prompts.TAGS[i % 6]]
    record = records[rng.integers(len(records))]
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

"""Generates prompts in GenEval++'s format and wording: a training set for it was never published.

Where GenEval++ writes "one cats" or "three benchs" this writes "one cat" and "three benches"; "on
the above" and "on the below" are kept, since they name the region that the judge is asked about.
"""

import functools
import itertools

from r3jax.data.generators import geneval
from r3jax.data.generators import spaces

# Regions of the first and the second item.
SIDES = (("left", "right"), ("above", "below"))
_FEW = (1, 2, 3)
_MANY = (4, 5, 6, 7)
_START = "A photo of"


def generate(number: int, seed: int) -> list[dict]:
  """Returns different records, one of each of the seven tags in turn; `spaces.draw` says more.

  In color_attr, prompts of three and of four objects take turns, in multi_object_count_attr
  prompts of two and of three classes.

  Raises:
    ValueError: if `number` is not positive or more than the 182,103,736,140 prompts that exist.
  """
  return spaces.draw(_TAGS, number, seed)


def _record(tag: str, items: list[dict], words: list[str]) -> dict:
  """Returns the record of items in words: "x and y", or "x, y, and z"."""
  listed = (
    " and ".join(words)
    if len(words) == 2
    else f"{', '.join(words[:-1])}, and {words[-1]}"
  )
  return {"tag": tag, "prompt": f"{_START} {listed}", "include": items}


def _items(
  names: tuple[str, ...], counts: tuple[int, ...] | None = None
) -> list[dict]:
  return [
    {"class": name, "count": count}
    for name, count in zip(names, counts or itertools.repeat(1))
  ]


def _color(items: list[dict], colors: tuple[str, ...]) -> list[dict]:
  return [item | {"color": color} for item, color in zip(items, colors)]


def _place(items: list[dict], regions: tuple[str, str]) -> list[dict]:
  return [item | {"region": region} for item, region in zip(items, regions)]


def _color_attr(names: tuple[str, ...], colors: tuple[str, ...]) -> dict:
  items = _color(_items(names), colors)
  return _record(
    "color_attr", items, [geneval.with_article(item) for item in items]
  )


def _spatial_count_attr(
  names: tuple[str, str], counts: tuple, sides: tuple
) -> dict:
  items = _place(_items(names, counts[0]), sides[0])
  words = [f"{geneval.counted(item)} on the {item['region']}" for item in items]
  return _record("spatial_count_attr", items, words)


def _color_spatial_attr(
  names: tuple[str, str], colors: tuple[str, str], sides: tuple
) -> dict:
  items = _place(_color(_items(names), colors), sides[0])
  words = [
    f"{item['color']} {item['class']} on the {item['region']}" for item in items
  ]
  return _record("color_spatial_attr", items, words)


def _color_count_attr(
  names: tuple[str, str], colors: tuple[str, str], counts: tuple
) -> dict:
  items = _color(_items(names, counts[0]), colors)
  return _record(
    "color_count_attr", items, [geneval.counted(item) for item in items]
  )


def _multi_object_count_attr(names: tuple[str, ...], counts: tuple) -> dict:
  items = _items(names, counts[0])
  return _record(
    "multi_object_count_attr", items, [geneval.counted(item) for item in items]
  )


def _size_spatial_attr(names: tuple[str, str], sides: tuple) -> dict:
  sized = [
    item | {"size": size}
    for item, size in zip(_items(names), ("larger", "smaller"))
  ]
  items = _place(sized, sides[0])
  words = [
    f"a {item['size']} {item['class']} on the {item['region']}"
    for item in items
  ]
  return _record("size_spatial_attr", items, words)


def _counts(number: int) -> tuple[tuple, int]:
  """Returns the choice of a count of 1 to 3 for each of `number` items."""
  return tuple(itertools.product(_FEW, repeat=number)), 1


_TAGS = {
  "color_attr": tuple(
    spaces.Space(
      ((geneval.COLORED, number), (geneval.COLORS, number)), _color_attr
    )
    for number in (3, 4)
  ),
  "spatial_count_attr": (
    spaces.Space(
      ((geneval.CLASSES, 2), _counts(2), (SIDES, 1)), _spatial_count_attr
    ),
  ),
  "color_spatial_attr": (
    spaces.Space(
      ((geneval.COLORED, 2), (geneval.COLORS, 2), (SIDES, 1)),
      _color_spatial_attr,
    ),
  ),
  "color_count_attr": (
    spaces.Space(
      ((geneval.COLORED, 2), (geneval.COLORS, 2), _counts(2)), _color_count_attr
    ),
  ),
  "multi_object_count_attr": tuple(
    spaces.Space(
      ((geneval.CLASSES, number), _counts(number)), _multi_object_count_attr
    )
    for number in (2, 3)
  ),
  "size_spatial_attr": (
    spaces.Space(((geneval.CLASSES, 2), (SIDES, 1)), _size_spatial_attr),
  ),
  "counting": (
    spaces.Space(
      ((geneval.CLASSES, 1), (_MANY, 1)),
      functools.partial(geneval.counting_record, _START),
    ),
  ),
}

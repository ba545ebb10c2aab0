"""Generates prompts in GenEval++'s format and wording: a training set for it was never published.

GenEval++ writes "one cats" and "three benchs"; this writes "one cat" and "three benches". "On the
above" and "on the below" are kept, since they name the region that the judge is asked about.
"""

from collections.abc import Sequence
import functools
import itertools

from r3jax.data import records
from r3jax.data.generators import geneval
from r3jax.data.generators import spaces

# Regions of the first and the second item.
SIDES = (("left", "right"), ("above", "below"))
_FEW = (1, 2, 3)
_MANY = (4, 5, 6, 7)
_START = "A photo of"


def generate(number: int, seed: int) -> list[records.Prompt]:
  """Returns different prompts, one of each of the seven tags in turn, see `spaces.draw`.

  In color_attr, prompts of three and of four objects take turns, in multi_object_count_attr
  prompts of two and of three classes.

  Raises:
    ValueError: `number` is not positive or more than the 182,103,736,140 prompts that exist.
  """
  return spaces.draw(_TAGS, number, seed)


def _prompt(
  tag: str, items: Sequence[records.Expectation], phrases: Sequence[str]
) -> records.Prompt:
  """Returns the prompt for items in words: "x and y", or "x, y, and z"."""
  if len(phrases) == 2:
    listed = " and ".join(phrases)
  else:
    listed = f"{', '.join(phrases[:-1])}, and {phrases[-1]}"
  return records.Prompt(tag, f"{_START} {listed}", tuple(items))


def _color_attr(
  class_names: tuple[str, ...], colors: tuple[str, ...]
) -> records.Prompt:
  items = [
    records.Expectation(class_name, 1, color)
    for class_name, color in zip(class_names, colors, strict=True)
  ]
  phrases = [geneval.with_article(item) for item in items]
  return _prompt("color_attr", items, phrases)


def _spatial_count_attr(
  class_names: tuple[str, str], counts: tuple, sides: tuple
) -> records.Prompt:
  items = [
    records.Expectation(class_name, count, region=region)
    for class_name, count, region in zip(
      class_names, counts[0], sides[0], strict=True
    )
  ]
  phrases = [f"{geneval.counted(item)} on the {item.region}" for item in items]
  return _prompt("spatial_count_attr", items, phrases)


def _color_spatial_attr(
  class_names: tuple[str, str], colors: tuple[str, str], sides: tuple
) -> records.Prompt:
  items = [
    records.Expectation(class_name, 1, color, region=region)
    for class_name, color, region in zip(
      class_names, colors, sides[0], strict=True
    )
  ]
  phrases = [
    f"{item.color} {item.class_name} on the {item.region}" for item in items
  ]
  return _prompt("color_spatial_attr", items, phrases)


def _color_count_attr(
  class_names: tuple[str, str], colors: tuple[str, str], counts: tuple
) -> records.Prompt:
  items = [
    records.Expectation(class_name, count, color)
    for class_name, count, color in zip(
      class_names, counts[0], colors, strict=True
    )
  ]
  phrases = [geneval.counted(item) for item in items]
  return _prompt("color_count_attr", items, phrases)


def _multi_object_count_attr(
  class_names: tuple[str, ...], counts: tuple
) -> records.Prompt:
  items = [
    records.Expectation(class_name, count)
    for class_name, count in zip(class_names, counts[0], strict=True)
  ]
  phrases = [geneval.counted(item) for item in items]
  return _prompt("multi_object_count_attr", items, phrases)


def _size_spatial_attr(
  class_names: tuple[str, str], sides: tuple
) -> records.Prompt:
  sizes = ("larger", "smaller")
  items = [
    records.Expectation(class_name, 1, region=region, size=size)
    for class_name, region, size in zip(
      class_names, sides[0], sizes, strict=True
    )
  ]
  phrases = [
    f"a {item.size} {item.class_name} on the {item.region}" for item in items
  ]
  return _prompt("size_spatial_attr", items, phrases)


def _counts(number: int) -> tuple[tuple, int]:
  """Returns the choice of a count of 1 to 3 for each of `number` items."""
  return tuple(itertools.product(_FEW, repeat=number)), 1


_TAGS: spaces.Tags = {
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
      functools.partial(geneval.counting_prompt, _START),
    ),
  ),
}

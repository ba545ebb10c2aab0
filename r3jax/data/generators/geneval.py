"""Generates prompts in GenEval's format and wording (arXiv 2310.11513), for training."""

from collections.abc import Sequence
import dataclasses
import functools

from r3jax.data import records
from r3jax.data.generators import spaces

# COCO's 80 classes under GenEval's names: "computer mouse", "tv remote", "computer keyboard", ...
CLASSES = (
  "person",
  "bicycle",
  "car",
  "motorcycle",
  "airplane",
  "bus",
  "train",
  "truck",
  "boat",
  "traffic light",
  "fire hydrant",
  "stop sign",
  "parking meter",
  "bench",
  "bird",
  "cat",
  "dog",
  "horse",
  "sheep",
  "cow",
  "elephant",
  "bear",
  "zebra",
  "giraffe",
  "backpack",
  "umbrella",
  "handbag",
  "tie",
  "suitcase",
  "frisbee",
  "skis",
  "snowboard",
  "sports ball",
  "kite",
  "baseball bat",
  "baseball glove",
  "skateboard",
  "surfboard",
  "tennis racket",
  "bottle",
  "wine glass",
  "cup",
  "fork",
  "knife",
  "spoon",
  "bowl",
  "banana",
  "apple",
  "sandwich",
  "orange",
  "broccoli",
  "carrot",
  "hot dog",
  "pizza",
  "donut",
  "cake",
  "chair",
  "couch",
  "potted plant",
  "bed",
  "dining table",
  "toilet",
  "tv",
  "laptop",
  "computer mouse",
  "tv remote",
  "computer keyboard",
  "cell phone",
  "microwave",
  "oven",
  "toaster",
  "sink",
  "refrigerator",
  "book",
  "clock",
  "vase",
  "scissors",
  "teddy bear",
  "hair drier",
  "toothbrush",
)
# No prompt names a colour of a person.
COLORED = tuple(name for name in CLASSES if name != "person")
COLORS = (
  "red",
  "orange",
  "yellow",
  "green",
  "blue",
  "purple",
  "pink",
  "brown",
  "black",
  "white",
)
RELATIONS = ("left of", "right of", "above", "below")
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven")
_COUNTS = (2, 3, 4)
# GenEval itself writes "persons", "knifes", "sheeps", ...
_PLURALS = {
  "person": "people",
  "knife": "knives",
  "sheep": "sheep",
  "skis": "skis",
  "scissors": "scissors",
  "broccoli": "broccoli",
  "computer mouse": "computer mice",
}


def generate(number: int, seed: int) -> list[records.Prompt]:
  """Returns different prompts, one of each tag in turn, see `spaces.draw`.

  Official prompts are among them, for example all 80 of single_object: `contamination.clean` drops
  them before training.

  Raises:
    ValueError: `number` is not positive or more than the 587,290 prompts that exist.
  """
  return spaces.draw(_TAGS, number, seed)


def plural(name: str) -> str:
  """Returns the plural of a class."""
  if name in _PLURALS:
    return _PLURALS[name]
  ending = "es" if name.endswith(("s", "x", "ch", "sh")) else "s"
  return name + ending


def counted(item: records.Expectation) -> str:
  """Returns an item in words with its number: "one cat", "three red benches"."""
  noun = item.class_name if item.count == 1 else plural(item.class_name)
  words = [NUMBER_WORDS[item.count], item.color, noun]
  return " ".join(word for word in words if word)


def with_article(item: records.Expectation) -> str:
  """Returns an item of one object in words: "a bench", "an orange bench"."""
  words = item.class_name
  if item.color:
    words = f"{item.color} {words}"
  article = "an" if words[0] in "aeiou" else "a"
  return f"{article} {words}"


def counting_prompt(
  start: str, class_names: tuple[str], counts: tuple[int]
) -> records.Prompt:
  """Returns the prompt for exactly `counts[0]` objects of a class; its text begins with `start`."""
  item = records.Expectation(class_names[0], counts[0])
  return records.Prompt(
    tag="counting",
    text=f"{start} {counted(item)}",
    include=(item,),
    exclude=(dataclasses.replace(item, count=item.count + 1),),
  )


def _objects_prompt(
  tag: str, class_names: Sequence[str], colors: Sequence[str | None] = ()
) -> records.Prompt:
  """Returns the prompt for one object of each class, coloured if there are colours."""
  colors = colors or [None] * len(class_names)
  items = tuple(
    records.Expectation(class_name, 1, color)
    for class_name, color in zip(class_names, colors, strict=True)
  )
  phrases = " and ".join(with_article(item) for item in items)
  return records.Prompt(tag, f"a photo of {phrases}", items)


def _relation_prompt(
  class_names: tuple[str, str], relations: tuple[str]
) -> records.Prompt:
  """Returns the prompt for the first class in a relation to the second, which is item 0."""
  relation = relations[0]
  base = records.Expectation(class_names[1], 1)
  related = records.Expectation(class_names[0], 1, position=(relation, 0))
  return records.Prompt(
    tag="position",
    text=f"a photo of {with_article(related)} {relation} {with_article(base)}",
    include=(base, related),
  )


_TAGS: spaces.Tags = {
  "single_object": (
    spaces.Space(
      ((CLASSES, 1),), functools.partial(_objects_prompt, "single_object")
    ),
  ),
  "two_object": (
    spaces.Space(
      ((CLASSES, 2),), functools.partial(_objects_prompt, "two_object")
    ),
  ),
  "counting": (
    spaces.Space(
      ((CLASSES, 1), (_COUNTS, 1)),
      functools.partial(counting_prompt, "a photo of"),
    ),
  ),
  "colors": (
    spaces.Space(
      ((COLORED, 1), (COLORS, 1)), functools.partial(_objects_prompt, "colors")
    ),
  ),
  "position": (spaces.Space(((CLASSES, 2), (RELATIONS, 1)), _relation_prompt),),
  "color_attr": (
    spaces.Space(
      ((COLORED, 2), (COLORS, 2)),
      functools.partial(_objects_prompt, "color_attr"),
    ),
  ),
}

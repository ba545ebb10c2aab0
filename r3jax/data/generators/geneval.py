"""Generates prompts in GenEval's format and wording (arXiv 2310.11513), for training."""

from collections.abc import Sequence
import functools
import itertools

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
# No prompt colours a person.
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


def generate(number: int, seed: int) -> list[dict]:
  """Returns different records, one of each tag in turn; `spaces.draw` says more.

  Official prompts are among them, all 80 of single_object for one: `contamination.clean` drops
  them before training.

  Raises:
    ValueError: if `number` is not positive or more than the 587,290 prompts that exist.
  """
  return spaces.draw(_TAGS, number, seed)


def plural(name: str) -> str:
  """Returns the plural of a class."""
  if name in _PLURALS:
    return _PLURALS[name]
  return name + ("es" if name.endswith(("s", "x", "ch", "sh")) else "s")


def counted(item: dict) -> str:
  """Returns an item in words with its number: "one cat", "three red benches"."""
  name = item["class"] if item["count"] == 1 else plural(item["class"])
  return " ".join([NUMBER_WORDS[item["count"]], *_color(item), name])


def with_article(item: dict) -> str:
  """Returns an item of one object in words: "a bench", "an orange bench"."""
  words = " ".join([*_color(item), item["class"]])
  return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def counting_record(start: str, names: tuple[str], counts: tuple[int]) -> dict:
  """Returns the record of so many of a class and no more; the prompt begins with `start`."""
  item = {"class": names[0], "count": counts[0]}
  return {
    "tag": "counting",
    "prompt": f"{start} {counted(item)}",
    "include": [item],
    "exclude": [item | {"count": counts[0] + 1}],
  }


def _color(item: dict) -> list[str]:
  return [item["color"]] if "color" in item else []


def _objects(
  tag: str, names: Sequence[str], colors: Sequence[str] = ()
) -> dict:
  """Returns the record of one object of each class, coloured if there are colours."""
  items = [
    {"class": name, "count": 1} | ({"color": color} if color else {})
    for name, color in itertools.zip_longest(names, colors)
  ]
  prompt = "a photo of " + " and ".join(map(with_article, items))
  return {"tag": tag, "prompt": prompt, "include": items}


def _related(names: tuple[str, str], relations: tuple[str]) -> dict:
  """Returns the record of the first class in a relation to the second, which is item 0."""
  (first, second), (relation,) = names, relations
  items = [
    {"class": second, "count": 1},
    {"class": first, "count": 1, "position": [relation, 0]},
  ]
  prompt = (
    f"a photo of {with_article(items[1])} {relation} {with_article(items[0])}"
  )
  return {"tag": "position", "prompt": prompt, "include": items}


_TAGS = {
  "single_object": (
    spaces.Space(((CLASSES, 1),), functools.partial(_objects, "single_object")),
  ),
  "two_object": (
    spaces.Space(((CLASSES, 2),), functools.partial(_objects, "two_object")),
  ),
  "counting": (
    spaces.Space(
      ((CLASSES, 1), (_COUNTS, 1)),
      functools.partial(counting_record, "a photo of"),
    ),
  ),
  "colors": (
    spaces.Space(
      ((COLORED, 1), (COLORS, 1)), functools.partial(_objects, "colors")
    ),
  ),
  "position": (spaces.Space(((CLASSES, 2), (RELATIONS, 1)), _related),),
  "color_attr": (
    spaces.Space(
      ((COLORED, 2), (COLORS, 2)), functools.partial(_objects, "color_attr")
    ),
  ),
}

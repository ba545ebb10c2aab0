"""Generates prompts that ask for a text in the image: a training set, and a test set of its own.

A prompt is a scene and an inscription in double quotes: 'a photo of a wooden signpost that says
"Quiet Harbor"'. Its tag says what the inscription is made of. The test set comes from the same
spaces; a training prompt with an inscription of the test set is dropped whatever its scene is, see
`contamination.clean`.
"""

from collections.abc import Callable

from r3jax.data import records
from r3jax.data.generators import spaces

# Prompts of the test set, the same number of each tag.
NUM_HELDOUT = 200
# No seed of a training set (`data.generated_seed`) is negative.
_HELDOUT_SEED = -1

_SCENES = (
  "a shop sign above a door",
  "a neon sign in a dark street",
  "a wooden signpost on a hiking trail",
  "a blackboard in a café",
  "a whiteboard in an office",
  "a banner across a street",
  "a poster on a brick wall",
  "a billboard beside a highway",
  "the cover of a book on a table",
  "a label on a glass jar",
  "a coffee mug on a desk",
  "a white T-shirt on a hanger",
  "a baseball cap on a hook",
  "a birthday cake with icing",
  "a greeting card in an envelope",
  "a paper bag on a counter",
  "a metal plaque on a stone wall",
  "a street sign at a crossing",
  "a license plate on an old car",
  "the side of a delivery van",
  "the side of a sailing boat",
  "a cardboard box in a hallway",
  "a ticket on a wooden table",
  "a luggage tag on a suitcase",
  "a screen in a train station",
  "a phone that shows a message",
  "a sticky note on a fridge",
  "letters drawn in wet sand",
  "graffiti on a concrete wall",
  "a balloon in a garden",
  "a flag on a pole",
  "an embroidered cushion on a sofa",
)
_WORDS = (
  "open",
  "closed",
  "exit",
  "bakery",
  "library",
  "museum",
  "welcome",
  "hello",
  "summer",
  "winter",
  "coffee",
  "pharmacy",
  "garage",
  "theater",
  "orchard",
  "harvest",
  "station",
  "market",
  "gallery",
  "studio",
  "kitchen",
  "fragile",
  "danger",
  "caution",
  "recycle",
  "reserved",
  "vacancy",
  "parking",
  "detour",
  "bridge",
  "ferry",
  "airport",
  "laundry",
  "florist",
  "jewelry",
  "antiques",
  "carpets",
  "bicycles",
  "records",
  "stationery",
  "hardware",
  "groceries",
  "chocolate",
  "lemonade",
  "cinnamon",
  "pancakes",
  "sandwich",
  "breakfast",
  "dinner",
  "celebrate",
  "congratulations",
  "imagine",
  "adventure",
  "courage",
  "freedom",
  "journey",
  "wonder",
  "gravity",
  "quantum",
  "galaxy",
  "thunder",
  "rainbow",
  "lighthouse",
  "compass",
  "horizon",
  "mountain",
  "glacier",
  "desert",
  "jungle",
  "volcano",
  "penguin",
  "dolphin",
  "falcon",
  "hedgehog",
  "squirrel",
  "butterfly",
  "orchestra",
  "symphony",
  "rhythm",
  "melody",
  "champion",
  "marathon",
  "victory",
  "finish",
  "tomorrow",
  "yesterday",
  "monday",
  "friday",
  "october",
  "january",
  "express",
  "priority",
  "airmail",
  "passport",
  "customs",
  "platform",
  "departures",
  "arrivals",
  "reception",
  "elevator",
)
_ADJECTIVES = (
  "quiet",
  "golden",
  "little",
  "happy",
  "northern",
  "ancient",
  "electric",
  "frozen",
  "crooked",
  "silver",
  "wild",
  "gentle",
  "hidden",
  "brave",
  "lucky",
  "purple",
  "royal",
  "hungry",
  "velvet",
  "broken",
  "silent",
  "sunny",
  "dusty",
  "giant",
  "clever",
  "midnight",
  "paper",
  "copper",
  "rusty",
  "foggy",
)
_NOUNS = (
  "harbor",
  "river",
  "garden",
  "fox",
  "lantern",
  "castle",
  "forest",
  "kettle",
  "anchor",
  "candle",
  "meadow",
  "tower",
  "engine",
  "rabbit",
  "orchid",
  "island",
  "raven",
  "valley",
  "window",
  "planet",
  "violin",
  "bridge",
  "feather",
  "pepper",
  "walnut",
  "turtle",
  "pocket",
  "ladder",
  "mirror",
  "button",
  "whale",
  "canyon",
  "cottage",
  "pilot",
  "dragon",
  "wagon",
  "spoon",
  "blanket",
  "pumpkin",
  "marble",
)
_VERBS = (
  "follow",
  "find",
  "cross",
  "paint",
  "visit",
  "share",
  "remember",
  "keep",
  "open",
  "protect",
  "carry",
  "repair",
  "explore",
  "count",
  "welcome",
)
_PLACES = ("room", "gate", "platform", "table", "locker", "bus", "floor")
_HALVES = ("AM", "PM")
_CASES: tuple[Callable[[str], str], ...] = (str.upper, str.title, str.lower)
_SENTENCE_CASES: tuple[Callable[[str], str], ...] = (str.upper, str.capitalize)


def generate(number: int, seed: int) -> list[records.Prompt]:
  """Returns different prompts, one of each tag in turn, see `spaces.draw`.

  Raises:
    ValueError: `number` is not positive or more than the prompts that exist, or `seed` is the test
      set's.
  """
  if seed == _HELDOUT_SEED:
    raise ValueError(f"the seed {seed} is that of the test set; use another")
  return spaces.draw(_SPACES, number, seed)


def heldout() -> list[records.Prompt]:
  """Returns the prompts of the test set, always the same."""
  return spaces.draw(_SPACES, NUM_HELDOUT, _HELDOUT_SEED)


def _prompt(tag: str, inscription: str, scene: str) -> records.Prompt:
  text = f'a photo of {scene} that says "{inscription}"'
  return records.Prompt(tag, text, inscription=inscription)


def _word(words: tuple, cases: tuple, scenes: tuple) -> records.Prompt:
  """Returns the prompt for a word, as "Bakery"."""
  return _prompt("word", cases[0](words[0]), scenes[0])


def _words(
  adjectives: tuple, nouns: tuple, cases: tuple, scenes: tuple
) -> records.Prompt:
  """Returns the prompt for two words, as "QUIET HARBOR"."""
  inscription = cases[0](f"{adjectives[0]} {nouns[0]}")
  return _prompt("words", inscription, scenes[0])


def _sentence(
  verbs: tuple, adjectives: tuple, nouns: tuple, cases: tuple, scenes: tuple
) -> records.Prompt:
  """Returns the prompt for a sentence of four words, as "Follow the golden fox"."""
  inscription = cases[0](f"{verbs[0]} the {adjectives[0]} {nouns[0]}")
  return _prompt("sentence", inscription, scenes[0])


def _place(places: tuple, numbers: tuple, scenes: tuple) -> records.Prompt:
  """Returns the prompt for a place with its number, as "Gate 17"."""
  inscription = f"{places[0].title()} {numbers[0]}"
  return _prompt("number", inscription, scenes[0])


def _price(dollars: tuple, cents: tuple, scenes: tuple) -> records.Prompt:
  """Returns the prompt for a price, as "$4.50"."""
  return _prompt("number", f"${dollars[0]}.{cents[0]:02d}", scenes[0])


def _time(
  hours: tuple, minutes: tuple, halves: tuple, scenes: tuple
) -> records.Prompt:
  """Returns the prompt for a time, as "7:30 PM"."""
  inscription = f"{hours[0]}:{minutes[0]:02d} {halves[0]}"
  return _prompt("number", inscription, scenes[0])


_SPACES: spaces.Tags = {
  "word": (spaces.Space(((_WORDS, 1), (_CASES, 1), (_SCENES, 1)), _word),),
  "words": (
    spaces.Space(
      ((_ADJECTIVES, 1), (_NOUNS, 1), (_CASES, 1), (_SCENES, 1)), _words
    ),
  ),
  "sentence": (
    spaces.Space(
      (
        (_VERBS, 1),
        (_ADJECTIVES, 1),
        (_NOUNS, 1),
        (_SENTENCE_CASES, 1),
        (_SCENES, 1),
      ),
      _sentence,
    ),
  ),
  "number": (
    spaces.Space(((_PLACES, 1), (range(2, 1000), 1), (_SCENES, 1)), _place),
    spaces.Space(((range(1, 100), 1), (range(100), 1), (_SCENES, 1)), _price),
    spaces.Space(
      ((range(1, 13), 1), (range(60), 1), (_HALVES, 1), (_SCENES, 1)), _time
    ),
  ),
}
# What inscriptions are made of.
TAGS = tuple(_SPACES)

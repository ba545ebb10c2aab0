"""Numbers the prompts that a benchmark's tags can make, and draws from them without repeats.

The spaces are far too large to list (GenEval's color_attr has half a million prompts), so a prompt
is found by its number and a shuffle keeps only the places that it has moved.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
import itertools
import math
import random


@dataclasses.dataclass(frozen=True)
class Space:
  """The records of a tag that differ in what is chosen for them.

  Attributes:
    choices: (values, how many different ones of them, in order) of each choice.
    build: makes the record of a tuple of chosen values for each choice.
  """

  choices: tuple[tuple[Sequence, int], ...]
  build: Callable[..., dict]

  @property
  def size(self) -> int:
    """The number of records."""
    return math.prod(
      math.perm(len(values), count) for values, count in self.choices
    )

  def record(self, index: int) -> dict:
    """Returns the record of a number, 0 to size - 1."""
    chosen = []
    for values, count in self.choices:
      left, taken = list(values), []
      for _ in range(count):
        index, place = divmod(index, len(left))
        taken.append(left.pop(place))
      chosen.append(tuple(taken))
    return self.build(*chosen)


Tags = Mapping[str, tuple[Space, ...]]


def draw(tags: Tags, number: int, seed: int) -> list[dict]:
  """Draws different records, one of each tag in turn; a tag that has no more is passed over.

  The spaces of a tag take turns in the same way. The first n of a longer draw are a draw of n.

  Args:
    tags: the spaces of each tag, which make different prompts.
    number: how many records.
    seed: source of the order within each space.

  Raises:
    ValueError: if there are fewer than `number` records, or `number` is not positive.
  """
  most = sum(space.size for spaces in tags.values() for space in spaces)
  if not 1 <= number <= most:
    raise ValueError(
      f"number must be at least 1 and at most the {most} prompts that exist, "
      f"got {number}"
    )
  of_tags = [
    _in_turn(
      [
        _shuffled(space, random.Random(f"{seed}/{tag}/{place}"))
        for place, space in enumerate(spaces)
      ]
    )
    for tag, spaces in tags.items()
  ]
  return list(itertools.islice(_in_turn(of_tags), number))


def _in_turn(sources: Iterable[Iterator[dict]]) -> Iterator[dict]:
  """Yields one of each source in turn, leaving out those that are exhausted."""
  left = list(sources)
  while left:
    for source in tuple(left):
      try:
        yield next(source)
      except StopIteration:
        left.remove(source)


def _shuffled(space: Space, rng: random.Random) -> Iterator[dict]:
  """Yields every record once, by a Fisher-Yates shuffle that lists only the moved numbers."""
  moved = {}
  for last in reversed(range(space.size)):
    place = rng.randrange(last + 1)
    index = moved.get(place, place)
    moved[place] = moved.pop(last, last)
    yield space.record(index)

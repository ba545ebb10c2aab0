"""Numbers the prompts that a benchmark's tags can form, and draws from them without repeats.

The spaces are far too large to list (GenEval's color_attr has half a million prompts). A prompt is
therefore built from its number, and a shuffle stores only the numbers that it has moved.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
import itertools
import math
import random

from r3jax.data import records


@dataclasses.dataclass(frozen=True)
class Space:
  """The prompts of a tag that differ in what is chosen for them.

  Attributes:
    choices: (values, the number of different ones that are chosen, in order) for each choice.
    build: builds a prompt from one tuple of chosen values for each choice.
  """

  choices: tuple[tuple[Sequence, int], ...]
  build: Callable[..., records.Prompt]

  @property
  def size(self) -> int:
    """The number of prompts."""
    return math.prod(
      math.perm(len(values), count) for values, count in self.choices
    )

  def prompt(self, index: int) -> records.Prompt:
    """Returns the prompt of a number, 0 to size - 1."""
    chosen = []
    for values, count in self.choices:
      # Digits of `index` whose base shrinks with every value that is taken.
      remaining = list(values)
      taken = []
      for _ in range(count):
        index, place = divmod(index, len(remaining))
        taken.append(remaining.pop(place))
      chosen.append(tuple(taken))
    return self.build(*chosen)


Tags = Mapping[str, tuple[Space, ...]]


def draw(tags: Tags, number: int, seed: int) -> list[records.Prompt]:
  """Draws different prompts, one of each tag in turn; a tag without further prompts is skipped.

  The spaces of a tag take turns in the same way. The first n of a longer draw are a draw of n.

  Args:
    tags: the spaces of each tag, which build different prompts.
    number: the number of prompts.
    seed: decides the order within each space.

  Raises:
    ValueError: there are fewer than `number` prompts, or `number` is not positive.
  """
  all_spaces = itertools.chain.from_iterable(tags.values())
  size = sum(space.size for space in all_spaces)
  if not 1 <= number <= size:
    raise ValueError(
      f"number must be at least 1 and at most the {size} prompts that exist, "
      f"got {number}"
    )
  prompts_by_tag = []
  for tag, spaces in tags.items():
    # A seed of its own keeps the order within a space when another space changes.
    shuffled_spaces = [
      _shuffled(space, random.Random(f"{seed}/{tag}/{place}"))
      for place, space in enumerate(spaces)
    ]
    prompts_by_tag.append(_in_turn(shuffled_spaces))
  return list(itertools.islice(_in_turn(prompts_by_tag), number))


def _in_turn(
  sources: Iterable[Iterator[records.Prompt]],
) -> Iterator[records.Prompt]:
  """Yields one prompt of each source in turn, skipping sources that are exhausted."""
  remaining = list(sources)
  while remaining:
    for source in tuple(remaining):
      try:
        yield next(source)
      except StopIteration:
        remaining.remove(source)


def _shuffled(space: Space, rng: random.Random) -> Iterator[records.Prompt]:
  """Yields every prompt once, by a Fisher-Yates shuffle that stores only the moved numbers."""
  moved: dict[int, int] = {}
  for last in reversed(range(space.size)):
    place = rng.randrange(last + 1)
    index = moved.get(place, place)
    moved[place] = moved.pop(last, last)
    yield space.prompt(index)

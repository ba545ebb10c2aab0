"""Static layouts of a sequence: positions, attention mask and expert of every slot.

A sequence is a tuple of segments of fixed capacity. Text segments have a dynamic length, image
segments are full. Rotary positions and attention masks follow from the layout and the lengths
(docs/algorithm.md#sequences). The expert of a slot is static, so that routing needs no gather.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from r3jax import types

Kind = Literal["text", "vit", "clean", "noise"]


@dataclasses.dataclass(frozen=True)
class Segment:
  """One run of tokens with one attention mode.

  Attributes:
    name: unique in its layout.
    kind: "text" (causal), "vit", "clean" (VAE latents at t = 0) or "noise" (latents at t); all but
      text attend in both directions.
    capacity: slots, markers included.
    sees: names of the earlier segments that it attends to; its rotary position starts after them.
    grid: rows and columns of the image's tokens; None for text.
  """

  name: str
  kind: Kind
  capacity: int
  sees: tuple[str, ...] = ()
  grid: tuple[int, int] | None = None

  @property
  def num_gen(self) -> int:
    """Slots of the gen expert: the latents of a VAE image."""
    return self.capacity - 2 if self.kind in ("clean", "noise") else 0

  @property
  def num_und(self) -> int:
    """Slots of the und expert: text, ViT patches and every marker."""
    return self.capacity - self.num_gen


def text(name: str, capacity: int, sees: Sequence[str] = ()) -> Segment:
  """Returns a causal text segment of at most `capacity` tokens, begin and end included."""
  return Segment(name, "text", capacity, tuple(sees))


def image(
  name: str, kind: Kind, grid: tuple[int, int], sees: Sequence[str] = ()
) -> Segment:
  """Returns an image segment: begin marker, `grid` tokens row by row, end marker."""
  rows, columns = grid
  return Segment(name, kind, rows * columns + 2, tuple(sees), (rows, columns))


@dataclasses.dataclass(frozen=True)
class Layout:
  """A sequence: an ordered tuple of segments with unique names.

  Attributes:
    segments: in the order in which they are fed; a segment sees earlier ones only.
  """

  segments: tuple[Segment, ...]

  def __post_init__(self):
    earlier = set()
    for segment in self.segments:
      missing = [name for name in segment.sees if name not in earlier]
      if missing or segment.name in earlier:
        raise ValueError(
          "a segment must have a new name and see earlier segments only; "
          f"{segment.name!r} sees {missing}"
        )
      earlier.add(segment.name)

  def __getitem__(self, name: str) -> Segment:
    return self.segments[self.index(name)]

  def index(self, name: str) -> int:
    """Returns the place of segment `name`."""
    return [segment.name for segment in self.segments].index(name)

  def slots(self, names: Sequence[str]) -> "Slots":
    """Returns the slots of the named segments: all und slots, then all gen slots."""
    return _slots(self, tuple(names))


# Compared by identity: `_slots` makes one object per layout and names.
@dataclasses.dataclass(frozen=True, eq=False)
class Slots:
  """Static description of the T slots of some segments, und slots first.

  Attributes:
    segment: [T] index of the slot's segment in the layout.
    offset: [T] place of the slot in its segment.
    num_und: how many of the T slots belong to the und expert.
    ranges: (und slice, gen slice) of each segment in the streams of the two experts, by name.
  """

  segment: np.ndarray
  offset: np.ndarray
  num_und: int
  ranges: dict[str, tuple[slice, slice]]


@functools.cache
def _slots(layout: Layout, names: tuple[str, ...]) -> Slots:
  # Sorted by expert once and for all, so that each expert works on one slice.
  und: list[tuple[int, int]] = []  # (segment, offset) of every slot
  gen: list[tuple[int, int]] = []
  ranges = {}
  for name in names:
    segment = layout[name]
    index = layout.index(name)
    slots = [(index, offset) for offset in range(segment.capacity)]
    und_start = len(und)
    gen_start = len(gen)
    if segment.num_gen:
      und += [slots[0], slots[-1]]  # the markers
      gen += slots[1:-1]
    else:
      und += slots
    ranges[name] = (slice(und_start, len(und)), slice(gen_start, len(gen)))
  table = np.array(und + gen, np.int32).reshape(-1, 2)
  return Slots(table[:, 0], table[:, 1], len(und), ranges)


def start(
  layout: Layout, name: str, lengths: Mapping[str, types.Lengths]
) -> types.Lengths | int:
  """Returns the rotary position of the first slot of a segment, [B] or a plain 0.

  It is the sum of what the segments before it advance the position by: a text by its length, an
  image by 1, a noisy latent not at all.
  """
  position = 0
  for earlier in layout[name].sees:
    kind = layout[earlier].kind
    if kind == "text":
      advance = lengths[earlier]
    elif kind == "noise":
      advance = 0
    else:
      advance = 1
    position = position + advance
  return position


def positions(
  layout: Layout,
  names: Sequence[str],
  lengths: Mapping[str, types.Lengths],
  rows: int,
) -> types.Positions:
  """Returns the rotary positions of the slots of the named segments.

  Args:
    layout: the sequence.
    names: segments, in the order of `layout.slots(names)`.
    lengths: [B] tokens in each text segment that is named or seen.
    rows: B.

  Returns:
    [B, T] int32; all slots of an image segment share one position.
  """
  slots = layout.slots(names)
  # Slots of a text count up from its first position, those of an image share one.
  starts = {name: start(layout, name, lengths) for name in names}
  start_of_slot = _per_segment(layout, starts, rows)[:, slots.segment]
  offset_in_text = slots.offset * _is_text(layout)[slots.segment]
  return start_of_slot + jnp.asarray(offset_in_text)


def visibility(
  layout: Layout, queries: Sequence[str], keys: Sequence[str]
) -> np.ndarray:
  """Returns the static part of the mask, as if every slot held a token.

  Args:
    layout: the sequence.
    queries: segments that attend.
    keys: segments that may be attended to.

  Returns:
    [T, S] bool.
  """
  query = layout.slots(queries)
  key = layout.slots(keys)
  sees = np.zeros((len(layout.segments), len(layout.segments)), bool)
  for row, segment in zip(sees, layout.segments, strict=True):
    row[[layout.index(name) for name in segment.sees]] = True
  # Segments are seen whole or not at all; inside of its own a text is causal, an image is not.
  sees_segment = sees[query.segment[:, None], key.segment[None, :]]
  same_segment = query.segment[:, None] == key.segment[None, :]
  is_text = _is_text(layout)[query.segment]
  is_causal = key.offset[None, :] <= query.offset[:, None]
  sees_inside = ~is_text[:, None] | is_causal
  return sees_segment | (same_segment & sees_inside)


def filled(
  layout: Layout,
  names: Sequence[str],
  lengths: Mapping[str, types.Lengths],
  rows: int,
) -> types.Filled:
  """Returns which slots hold a token; image slots always do.

  Args:
    layout: the sequence.
    names: segments, in the order of `layout.slots(names)`.
    lengths: [B] tokens in each named text segment.
    rows: B.

  Returns:
    [B, S] bool.
  """
  num_tokens = {}
  for segment in layout.segments:
    if segment.name not in names:
      continue
    if segment.kind == "text":
      num_tokens[segment.name] = lengths[segment.name]
    else:
      num_tokens[segment.name] = segment.capacity
  slots = layout.slots(names)
  tokens_in_segment = _per_segment(layout, num_tokens, rows)[:, slots.segment]
  return tokens_in_segment > jnp.asarray(slots.offset)


def _is_text(layout: Layout) -> np.ndarray:
  """Returns which segments are text, [segments] bool."""
  return np.array([segment.kind == "text" for segment in layout.segments])


def _per_segment(
  layout: Layout, values: Mapping[str, types.Lengths | int], rows: int
) -> jax.Array:
  """Returns one value per segment, [B, segments] int32; 0 where none is given."""
  columns = []
  for segment in layout.segments:
    value = jnp.asarray(values.get(segment.name, 0), jnp.int32)
    columns.append(jnp.broadcast_to(value, (rows,)))
  return jnp.stack(columns, axis=1)


@dataclasses.dataclass(frozen=True)
class View:
  """The static half of a mask.

  Attributes:
    layout: the sequence.
    queries: segments that attend.
    keys: segments that may be attended to.
  """

  layout: Layout
  queries: tuple[str, ...]
  keys: tuple[str, ...]

  def visible(self) -> np.ndarray:
    """Returns `visibility` of the segments, [T, S]; computed once per view."""
    return _visible(self)


@functools.cache
def _visible(view: View) -> np.ndarray:
  return visibility(view.layout, view.queries, view.keys)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
  """An attention mask in two halves, which a kernel can read without the whole.

  Attributes:
    filled: which keys hold a token.
    view: the static half.
  """

  filled: types.Filled  # [B, S]
  view: View = dataclasses.field(metadata={"static": True})

  def dense(self) -> types.Mask:
    """Returns the whole mask, [B, T, S]."""
    # Empty queries are not hidden: nothing reads their output.
    return jnp.asarray(self.view.visible()) & self.filled[:, None]


def mask(
  layout: Layout,
  queries: Sequence[str],
  keys: Sequence[str],
  lengths: Mapping[str, types.Lengths],
  rows: int,
) -> Mask:
  """Returns which slots of `queries` attend to which slots of `keys`.

  Args:
    layout: the sequence.
    queries: segments that attend.
    keys: segments that are attended to, as far as the layout lets them be seen.
    lengths: [B] tokens in each text segment of `keys`.
    rows: B.
  """
  return Mask(
    filled=filled(layout, keys, lengths, rows),
    view=View(layout, tuple(queries), tuple(keys)),
  )

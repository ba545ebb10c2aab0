"""Static layouts of a sequence: positions, attention and expert of every slot.

A sequence is a tuple of segments of fixed capacity. Text segments have a dynamic length, image
segments are full. From the layout and the lengths follow rotary positions and attention masks
(R3.md section 3); because the expert of a slot is static, routing needs no gather.
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
    kind: "text" (causal), "vit", "clean" (VAE latents at t = 0) or "noise" (latents at t).
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
  return Segment(name, kind, grid[0] * grid[1] + 2, tuple(sees), tuple(grid))


@dataclasses.dataclass(frozen=True)
class Layout:
  """An ordered tuple of segments with unique names."""

  segments: tuple[Segment, ...]

  def __post_init__(self):
    seen = set()
    for segment in self.segments:
      missing = [name for name in segment.sees if name not in seen]
      if missing or segment.name in seen:
        raise ValueError(
          f"a segment must have a new name and see earlier segments only; {segment.name!r} sees {missing}"
        )
      seen.add(segment.name)

  def __getitem__(self, name: str) -> Segment:
    return self.segments[self.index(name)]

  def index(self, name: str) -> int:
    """Returns the place of segment `name`."""
    return [segment.name for segment in self.segments].index(name)

  def slots(self, names: Sequence[str]) -> "Slots":
    """Returns the slots of the named segments: all und slots, then all gen slots."""
    return _slots(self, tuple(names))


# one object per layout and names, see `_slots`
@dataclasses.dataclass(frozen=True, eq=False)
class Slots:
  """Static description of the slots of some segments, und slots first.

  Attributes:
    segment: [T] index of the slot's segment in the layout.
    offset: [T] place of the slot in its segment.
    num_und: how many of the T slots belong to the und expert.
    ranges: for each segment name its (und slice, gen slice) in the two streams.
  """

  segment: np.ndarray
  offset: np.ndarray
  num_und: int
  ranges: dict[str, tuple[slice, slice]]


def _expert_offsets(segment: Segment) -> tuple[list[int], list[int]]:
  everything = list(range(segment.capacity))
  if not segment.num_gen:
    return everything, []
  return [everything[0], everything[-1]], everything[1:-1]


@functools.cache
def _slots(layout: Layout, names: tuple[str, ...]) -> Slots:
  streams: tuple[list, list] = ([], [])
  ranges = {}
  for name in names:
    starts = [len(stream) for stream in streams]
    for stream, offsets in zip(streams, _expert_offsets(layout[name])):
      stream.extend((layout.index(name), offset) for offset in offsets)
    ranges[name] = tuple(
      slice(start, len(stream)) for start, stream in zip(starts, streams)
    )
  table = np.array(streams[0] + streams[1], np.int32).reshape(-1, 2)
  return Slots(table[:, 0], table[:, 1], len(streams[0]), ranges)


def _advance(segment: Segment, lengths: Mapping[str, types.Lengths]):
  if segment.kind == "text":
    return lengths[segment.name]
  return 0 if segment.kind == "noise" else 1


def start(layout: Layout, name: str, lengths: Mapping[str, types.Lengths]):
  """Returns the rotary position of the first slot of a segment, [B] or a plain 0.

  Text advances the counter by its length, an image by 1, a noisy latent not at all.
  """
  return sum(_advance(layout[seen], lengths) for seen in layout[name].sees)


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
  first = {name: start(layout, name, lengths) for name in names}
  starts = _per_segment(layout, first, rows)[:, slots.segment]
  is_text = np.array([segment.kind == "text" for segment in layout.segments])[
    slots.segment
  ]
  return starts + jnp.asarray(slots.offset * is_text)


def _per_segment(
  layout: Layout, values: Mapping[str, types.Lengths | int], rows: int
):
  """Returns [B, segments] int32 of one value per segment, 0 where none is given."""
  columns = [values.get(segment.name, 0) for segment in layout.segments]
  return jnp.stack(
    [jnp.broadcast_to(jnp.asarray(c, jnp.int32), (rows,)) for c in columns],
    axis=1,
  )


def visibility(
  layout: Layout, queries: Sequence[str], keys: Sequence[str]
) -> np.ndarray:
  """Returns the static part of the mask, [T, S]: who may see whom if every slot is filled."""
  query, key = layout.slots(queries), layout.slots(keys)
  number = len(layout.segments)
  sees = np.zeros((number, number), bool)
  for i, segment in enumerate(layout.segments):
    sees[i, [layout.index(name) for name in segment.sees]] = True
  across = sees[query.segment[:, None], key.segment[None, :]]
  same = query.segment[:, None] == key.segment[None, :]
  is_text = np.array([segment.kind == "text" for segment in layout.segments])[
    query.segment
  ]
  inside = ~is_text[:, None] | (key.offset[None, :] <= query.offset[:, None])
  return across | (same & inside)


def filled(
  layout: Layout,
  names: Sequence[str],
  lengths: Mapping[str, types.Lengths],
  rows: int,
) -> types.Filled:
  """Returns which slots hold a token, [B, T]; image slots always do."""
  slots = layout.slots(names)
  held = {
    segment.name: lengths[segment.name]
    if segment.kind == "text"
    else segment.capacity
    for segment in layout.segments
    if segment.name in names
  }
  return _per_segment(layout, held, rows)[:, slots.segment] > jnp.asarray(
    slots.offset
  )


@dataclasses.dataclass(frozen=True)
class View:
  """The static half of a mask: which segments ask, and which are asked."""

  layout: Layout
  queries: tuple[str, ...]
  keys: tuple[str, ...]

  def visible(self) -> np.ndarray:
    """Returns who may see whom if every slot is filled, [T, S]."""
    return _visible(self)


@functools.cache
def _visible(view: View) -> np.ndarray:
  return visibility(view.layout, view.queries, view.keys)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
  """Who attends to whom: static structure, and which keys hold a token."""

  filled: types.Filled  # [B, S]
  view: View = dataclasses.field(metadata=dict(static=True))

  def dense(self) -> types.Mask:
    """Returns the whole mask, [B, T, S]."""
    return jnp.asarray(self.view.visible()) & self.filled[:, None]


def mask(
  layout: Layout,
  queries: Sequence[str],
  keys: Sequence[str],
  lengths: Mapping[str, types.Lengths],
  rows: int,
) -> Mask:
  """Returns who attends to whom: the slots of the segments `queries` to those of `keys`."""
  return Mask(
    filled(layout, keys, lengths, rows),
    View(layout, tuple(queries), tuple(keys)),
  )

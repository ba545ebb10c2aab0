"""Draws scenes of coloured shapes: the canvas of the embedded world.

A canvas is a 3x3 grid of 16-pixel cells, each empty or with one object. Objects vary in size and
stand a little off the centre of their cell. `prompts.py` has the prompts that ask for such scenes;
`verifier.py` reads a canvas back into objects.
"""

from collections.abc import Sequence
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

SHAPES = ("square", "ring", "cross", "spool", "bow", "heart")
COLORS = ("red", "green", "blue", "yellow", "purple", "black")
CELLS = (
  "top-left",
  "top",
  "top-right",
  "left-side",
  "center",
  "right-side",
  "bottom-left",
  "bottom",
  "bottom-right",
)
GRID = 3  # cells along a side
CELL = 16  # pixels along a side
CANVAS = GRID * CELL
SIZES = (10, 11, 12, 13)  # sides of objects in pixels
JITTER = 2  # largest offset from the centre of the cell in pixels
BACKGROUND = (240, 240, 240)
# Far apart from each other and from the background: the least distance is 170 in RGB.
PALETTE = (
  (235, 30, 10),
  (15, 185, 45),
  (10, 70, 235),
  (245, 215, 0),
  (170, 10, 190),
  (15, 15, 15),
)
_SUPERSAMPLE = 8
# Share of the second object in each pixel of a smudge: from 0 to 1 along the diagonal.
_FADE = np.clip(
  0.5 + (np.add.outer(np.arange(CELL), np.arange(CELL)) - (CELL - 1)) / 10, 0, 1
)


class Object(NamedTuple):
  """A coloured shape in a cell: indices into SHAPES, COLORS and CELLS."""

  shape: int
  color: int
  cell: int


@flax.struct.dataclass
class Scene:
  """What stands in each cell of a batch of canvases (row-major cells, int32).

  Offsets are counted from the cell's centre, rounded up and left where the object's size is odd.
  Where a cell is empty only `shape` matters. A second object of the same size and offset turns a
  cell into a smudge: the first fades into it along the diagonal, as in drafts of a model in doubt.
  """

  shape: jax.Array  # [..., 9] index into SHAPES, -1 where the cell is empty
  color: jax.Array  # [..., 9] index into COLORS
  size: jax.Array  # [..., 9] side of the object in pixels, one of SIZES
  dy: jax.Array  # [..., 9] offset downwards in pixels, in jitter_range(size)
  dx: jax.Array  # [..., 9] offset to the right in pixels, in jitter_range(size)
  ghost_shape: (
    jax.Array
  )  # [..., 9] of the second object, -1 where there is none
  ghost_color: jax.Array  # [..., 9] of the second object


def margin(size: int) -> int:
  """Returns the number of pixels above (and left of) an object of `size` at offset 0."""
  return (CELL - size) // 2


def jitter_range(size: int) -> tuple[int, int]:
  """Returns the smallest and largest offset that keep an object of `size` inside its cell."""
  return max(-JITTER, -margin(size)), min(JITTER, CELL - size - margin(size))


def render(scene: Scene) -> jax.Array:
  """Draws scenes inside a compiled function.

  Args:
    scene: arrays [..., 9]; offsets outside the legal range are drawn at its nearest end.

  Returns:
    uint8 [..., 48, 48, 3].
  """
  first = _paint(scene, scene.shape, scene.color)
  second = _paint(scene, scene.ghost_shape, scene.ghost_color)
  smudged = (scene.ghost_shape >= 0)[..., None, None, None]
  cells = jnp.where(smudged, first + _FADE[..., None] * (second - first), first)
  cells = jnp.round(cells).astype(jnp.uint8)
  batch = cells.shape[:-4]
  rows = cells.reshape(*batch, GRID, GRID, CELL, CELL, 3)
  return jnp.swapaxes(rows, -4, -3).reshape(*batch, CANVAS, CANVAS, 3)


def _paint(scene: Scene, shape: jax.Array, color: jax.Array) -> jax.Array:
  """Draws one object in every cell at the scene's sizes and offsets.

  Returns:
    float32 [..., 9, 16, 16, 3] in 0 to 255.
  """
  alpha = jnp.asarray(STAMPS)[
    shape, scene.size - SIZES[0], scene.dy + JITTER, scene.dx + JITTER
  ]
  alpha = jnp.where((shape >= 0)[..., None, None], alpha, 0.0)[..., None]
  paint = jnp.asarray(PALETTE, jnp.float32)[color][..., None, None, :]
  background = jnp.asarray(BACKGROUND, jnp.float32)
  return background + alpha * (paint - background)


def place(objects: Sequence[Object], rng: np.random.Generator) -> Scene:
  """Puts objects into their cells with random sizes and offsets.

  Args:
    objects: at most one per cell; plain (shape, color, cell) tuples do too.
    rng: source of sizes and offsets. Every cell draws, so that the jitter of one does not depend on
      what stands in the others.

  Returns:
    A numpy Scene of arrays [9].

  Raises:
    ValueError: an index is out of range, or two objects share a cell.
  """
  shape = np.full(len(CELLS), -1, np.int32)
  color = np.zeros(len(CELLS), np.int32)
  for shape_index, color_index, cell in objects:
    if not (
      0 <= shape_index < len(SHAPES)
      and 0 <= color_index < len(COLORS)
      and 0 <= cell < len(CELLS)
    ):
      raise ValueError(
        f"object must be (shape < {len(SHAPES)}, color < {len(COLORS)}, "
        f"cell < {len(CELLS)}), got {(shape_index, color_index, cell)}"
      )
    if shape[cell] >= 0:
      raise ValueError(
        f"a cell holds one object, but {list(objects)} uses {CELLS[cell]} twice"
      )
    shape[cell] = shape_index
    color[cell] = color_index
  size = rng.choice(SIZES, len(CELLS)).astype(np.int32)
  low, high = np.transpose([jitter_range(s) for s in size])
  dy, dx = rng.integers(low, high + 1, (2, len(CELLS)), dtype=np.int32)
  return Scene(
    shape=shape,
    color=color,
    size=size,
    dy=dy,
    dx=dx,
    ghost_shape=np.full_like(shape, -1),
    ghost_color=np.zeros_like(color),
  )


def smudge(
  scene: Scene, cells: Sequence[int], rng: np.random.Generator
) -> Scene:
  """Returns a numpy scene [9] with the objects of some cells smudged.

  The second object differs in shape, in colour or in both, equally often. The verifier reads fewer
  than one in ten of such smudges as an object.
  """
  ghost_shape = scene.ghost_shape.copy()
  ghost_color = scene.ghost_color.copy()
  for cell in cells:
    # (whether the shape differs, whether the colour differs)
    differs = ((True, False), (False, True), (True, True))[rng.integers(3)]
    shape_offset = int(rng.integers(1, len(SHAPES))) * differs[0]
    color_offset = int(rng.integers(1, len(COLORS))) * differs[1]
    ghost_shape[cell] = (scene.shape[cell] + shape_offset) % len(SHAPES)
    ghost_color[cell] = (scene.color[cell] + color_offset) % len(COLORS)
  return scene.replace(ghost_shape=ghost_shape, ghost_color=ghost_color)


def objects_of(scene: Scene) -> list[Object]:
  """Returns the objects of one scene (arrays [9]) in cell order; smudges are no objects."""
  shape = np.asarray(scene.shape)
  color = np.asarray(scene.color)
  is_object = (shape >= 0) & (np.asarray(scene.ghost_shape) < 0)
  return [
    Object(int(shape[cell]), int(color[cell]), int(cell))
    for cell in np.flatnonzero(is_object)
  ]


def smudges_of(scene: Scene) -> list[int]:
  """Returns the cells of one scene (arrays [9]) that hold a smudge."""
  is_smudge = np.asarray(scene.ghost_shape) >= 0
  return [int(cell) for cell in np.flatnonzero(is_smudge)]


def _masks(v: np.ndarray, u: np.ndarray) -> list[np.ndarray]:
  """Returns where each of SHAPES covers the unit square.

  Args:
    v: coordinate downwards in [0, 1].
    u: coordinate to the right in [0, 1].

  Returns:
    Boolean arrays of the same shape, in the order of SHAPES.
  """
  y = v - 0.5
  x = u - 0.5
  square = np.ones_like(v, bool)
  radius = np.hypot(y, x)
  ring = (radius >= 0.27) & (radius <= 0.5)
  cross = (np.abs(x - y) <= 0.2) | (np.abs(x + y) <= 0.2)
  spool = np.abs(x) <= np.abs(y)
  bow = np.abs(y) <= np.abs(x)
  # A heart is two discs above a tip.
  lobes = np.hypot(y + 0.25, np.abs(x) - 0.25) <= 0.26
  tip_width = 0.5 * (1 - np.maximum((y + 0.2) / 0.72, 0) ** 1.3)
  tip = (y > -0.2) & (np.abs(x) <= tip_width)
  heart = lobes | tip
  return [square, ring, cross, spool, bow, heart]


def coverage(size: float, top: float, left: float) -> np.ndarray:
  """Returns which share of each pixel of a cell every shape covers, by supersampling.

  Args:
    size: side of the object in pixels, possibly a fraction.
    top: pixels between the upper edges of cell and object.
    left: pixels between their left edges.

  Returns:
    float32 [shapes, CELL, CELL] in [0, 1].
  """
  fine = (np.arange(CELL * _SUPERSAMPLE) + 0.5) / _SUPERSAMPLE
  v, u = np.meshgrid((fine - top) / size, (fine - left) / size, indexing="ij")
  inside = (v >= 0) & (v <= 1) & (u >= 0) & (u <= 1)
  covered = np.stack(_masks(v, u)) & inside
  blocks = (len(SHAPES), CELL, _SUPERSAMPLE, CELL, _SUPERSAMPLE)
  pixels = covered.reshape(blocks).mean((2, 4))
  return pixels.astype(np.float32)


def _stamps() -> np.ndarray:
  """Returns the coverage of every shape, size and offset.

  Returns:
    float32 [shapes, sizes, 2 * JITTER + 1 (dy), 2 * JITTER + 1 (dx), CELL, CELL] in [0, 1].
  """
  offsets = range(-JITTER, JITTER + 1)
  num_offsets = len(offsets)
  stamps = np.zeros(
    (len(SHAPES), len(SIZES), num_offsets, num_offsets, CELL, CELL),
    np.float32,
  )
  for size_index, size in enumerate(SIZES):
    starts = margin(size) + np.clip(offsets, *jitter_range(size))
    for row, top in enumerate(starts):
      for column, left in enumerate(starts):
        stamps[:, size_index, row, column] = coverage(size, top, left)
  return stamps


STAMPS = _stamps()

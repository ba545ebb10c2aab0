"""Draws scenes of coloured shapes: the canvas of the embedded world.

A canvas is a 3x3 grid of 16-pixel cells, each empty or holding one object. Objects vary in size and
stand a little off the centre of their cell. `worlds/prompts.py` says which scenes a prompt asks
for; `rewards/shapes.py` reads a canvas back into objects.
"""

from collections.abc import Sequence

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
GRID = 3
CELL = 16
CANVAS = GRID * CELL
SIZES = (10, 11, 12, 13)
JITTER = 2
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


@flax.struct.dataclass
class Scene:
  """Holds what stands in each cell of a batch of canvases (row-major cells, int32).

  Pixels are counted from the cell's centre, rounded up-left when the object's size is odd. Only
  `shape` matters where a cell is empty. A second object in a cell of the same size and offset turns
  it into a smudge: the first fades into it along the diagonal, as in drafts of a model in doubt.
  """

  shape: jax.Array  # [..., 9] index into SHAPES, -1 where the cell is empty.
  color: jax.Array  # [..., 9] index into COLORS.
  # [..., 9] side of the object's square in pixels, one of SIZES.
  size: jax.Array
  # [..., 9] downward offset in pixels, inside jitter_range(size).
  dy: jax.Array
  # [..., 9] rightward offset in pixels, inside jitter_range(size).
  dx: jax.Array
  # [..., 9] of the second object, -1 where there is none.
  ghost_shape: jax.Array
  ghost_color: jax.Array  # [..., 9]


def margin(size: int) -> int:
  """Returns the pixels above (and left of) an object of `size` that stands at offset 0."""
  return (CELL - size) // 2


def jitter_range(size: int) -> tuple[int, int]:
  """Returns the smallest and largest offset that keep an object of `size` inside its cell."""
  return max(-JITTER, -margin(size)), min(JITTER, CELL - size - margin(size))


def render(scene: Scene) -> jax.Array:
  """Draws scenes, in-graph.

  Args:
    scene: arrays [..., 9]; offsets outside the legal range are drawn at its nearest end.

  Returns:
    uint8 [..., 48, 48, 3].
  """
  first, second = (
    _paint(scene, scene.shape, scene.color),
    _paint(scene, scene.ghost_shape, scene.ghost_color),
  )
  smudged = (scene.ghost_shape >= 0)[..., None, None, None]
  cells = jnp.where(smudged, first + _FADE[..., None] * (second - first), first)
  cells = jnp.round(cells).astype(jnp.uint8)
  batch = cells.shape[:-4]
  rows = cells.reshape(*batch, GRID, GRID, CELL, CELL, 3)
  return jnp.swapaxes(rows, -4, -3).reshape(*batch, CANVAS, CANVAS, 3)


def _paint(scene: Scene, shape: jax.Array, color: jax.Array) -> jax.Array:
  """Draws one object per cell at the scene's sizes and offsets, [..., 9, 16, 16, 3] in 0 to 255."""
  alpha = jnp.asarray(STAMPS)[
    shape, scene.size - SIZES[0], scene.dy + JITTER, scene.dx + JITTER
  ]
  alpha = jnp.where((shape >= 0)[..., None, None], alpha, 0.0)[..., None]
  paint = jnp.asarray(PALETTE, jnp.float32)[color][..., None, None, :]
  background = jnp.asarray(BACKGROUND, jnp.float32)
  return background + alpha * (paint - background)


def place(
  objects: Sequence[tuple[int, int, int]], rng: np.random.Generator
) -> Scene:
  """Puts objects into their cells with random sizes and offsets.

  Args:
    objects: (shape, color, cell) indices.
    rng: source of sizes and offsets; every cell draws, so a cell's jitter does not depend on what
      stands in the others.

  Returns:
    A numpy Scene of arrays [9].

  Raises:
    ValueError: if an index is out of range or two objects share a cell.
  """
  shape = np.full(len(CELLS), -1, np.int32)
  color = np.zeros(len(CELLS), np.int32)
  for kind, paint, cell in objects:
    if not (
      0 <= kind < len(SHAPES)
      and 0 <= paint < len(COLORS)
      and 0 <= cell < len(CELLS)
    ):
      raise ValueError(
        f"object must be (shape < {len(SHAPES)}, color < {len(COLORS)}, "
        f"cell < {len(CELLS)}), got {(kind, paint, cell)}"
      )
    if shape[cell] >= 0:
      raise ValueError(
        f"a cell holds one object, but {list(objects)} uses {CELLS[cell]} twice"
      )
    shape[cell], color[cell] = kind, paint
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

  The second object differs in shape, colour or both, equally often; the verifier reads fewer than
  one in ten of such smudges as an object.
  """
  shape, color = scene.ghost_shape.copy(), scene.ghost_color.copy()
  for cell in cells:
    differs = ((True, False), (False, True), (True, True))[rng.integers(3)]
    other = [
      int(rng.integers(1, len(names))) * d
      for names, d in zip((SHAPES, COLORS), differs)
    ]
    shape[cell] = (scene.shape[cell] + other[0]) % len(SHAPES)
    color[cell] = (scene.color[cell] + other[1]) % len(COLORS)
  return scene.replace(ghost_shape=shape, ghost_color=color)


def objects_of(scene: Scene) -> list[tuple[int, int, int]]:
  """Returns the (shape, color, cell) indices of one scene (arrays [9]), in cell order.

  Smudges are no objects.
  """
  shape, color = np.asarray(scene.shape), np.asarray(scene.color)
  clean = np.asarray(scene.ghost_shape) < 0
  return [
    (int(shape[cell]), int(color[cell]), cell)
    for cell in range(len(CELLS))
    if shape[cell] >= 0 and clean[cell]
  ]


def smudges_of(scene: Scene) -> list[int]:
  """Returns the cells of one scene (arrays [9]) that hold a smudge."""
  return [
    int(cell) for cell in np.flatnonzero(np.asarray(scene.ghost_shape) >= 0)
  ]


def _masks(v: np.ndarray, u: np.ndarray) -> list[np.ndarray]:
  """Returns where each of SHAPES covers the unit square (v down, u right, both in [0, 1])."""
  y, x = v - 0.5, u - 0.5
  radius = np.hypot(y, x)
  lobes = np.hypot(y + 0.25, np.abs(x) - 0.25) <= 0.26
  tip = (y > -0.2) & (
    np.abs(x) <= 0.5 * (1 - np.maximum((y + 0.2) / 0.72, 0) ** 1.3)
  )
  return [
    np.ones_like(v, bool),
    (radius >= 0.27) & (radius <= 0.5),
    (np.abs(x - y) <= 0.2) | (np.abs(x + y) <= 0.2),
    np.abs(x) <= np.abs(y),
    np.abs(y) <= np.abs(x),
    lobes | tip,
  ]


def coverage(size: float, top: float, left: float) -> np.ndarray:
  """Returns how much of each pixel of a cell every shape covers, anti-aliased by supersampling.

  Args:
    size: side of the object's square in pixels; fractions are fine.
    top: rows between the cell's upper edge and the square's.
    left: columns between the left edges.

  Returns:
    float32 [shapes, CELL, CELL] in [0, 1].
  """
  fine = (np.arange(CELL * _SUPERSAMPLE) + 0.5) / _SUPERSAMPLE
  v, u = np.meshgrid((fine - top) / size, (fine - left) / size, indexing="ij")
  inside = (v >= 0) & (v <= 1) & (u >= 0) & (u <= 1)
  covered = np.stack(_masks(v, u)) & inside
  pixels = covered.reshape(
    len(SHAPES), CELL, _SUPERSAMPLE, CELL, _SUPERSAMPLE
  ).mean((2, 4))
  return pixels.astype(np.float32)


def _stamps() -> np.ndarray:
  """Returns the coverage of every shape, size and offset.

  Returns:
    float32 [shapes, sizes, 2 * JITTER + 1 (dy), 2 * JITTER + 1 (dx), CELL, CELL] in [0, 1].
  """
  offsets = range(-JITTER, JITTER + 1)
  stamps = np.zeros(
    (len(SHAPES), len(SIZES), len(offsets), len(offsets), CELL, CELL),
    np.float32,
  )
  for i, size in enumerate(SIZES):
    starts = margin(size) + np.clip(offsets, *jitter_range(size))
    for j, top in enumerate(starts):
      for k, left in enumerate(starts):
        stamps[:, i, j, k] = coverage(size, top, left)
  return stamps


STAMPS = _stamps()

"""Verifies images of the embedded world against prompts, exactly and inside the compiled step.

`detect` finds the objects by the nearest drawing, `score` judges them by GenEval's rules
(docs/algorithm.md#rewards), `verify` does both. All three are pure functions of arrays and can be
compiled. `encode_records` makes the arrays of a batch of prompts beforehand.
"""

from collections.abc import Sequence
import functools
import itertools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from r3jax import types
from r3jax.data import records
from r3jax.worlds.shapes import prompts
from r3jax.worlds.shapes import scenes

PARTS = ("correct", "strict", "clutter")  # of the scores of `verify`
MAX_ITEMS = 3
MAX_EXCLUDES = 2

# A cell holds an object if the mean squared difference of its 768 numbers in [0, 1] to the nearest
# drawing is below the threshold of its colour. Drawings also stand at half pixels and have sizes in
# between, because a model's objects do. Let d_c be the colour c minus the background. The least
# differences, over all sizes and offsets, of what is *not* the object are
#   .0211 |d_c|²        half an object to any drawing,
#   .0230 |d_c|²        another shape of the same colour,
#   .0599 |d_c|²        a blank cell,
#   .0600 |d_b - d_c|²  the same shape in the colour b.
# The thresholds are below half of every one of them; they follow the contrast, as the eye does. A
# true object behind an autoencoder of RMS error e differs by e²: .0036 at .06, and yellow, the
# faintest colour, is lost from .089 on.
_BACKGROUND = np.float32(scenes.BACKGROUND)
_TINTS = (np.float32(scenes.PALETTE) - _BACKGROUND) / 255  # d_c, [colors, 3]
_TINT_SQUARES = np.sum(_TINTS**2, -1)  # |d_c|², [colors]
# |d_b - d_c|², [colors, colors]; a colour is no neighbour of its own.
_TINT_DISTANCES = np.sum((_TINTS[:, None] - _TINTS) ** 2, -1) + 9 * np.eye(
  len(_TINTS)
)
THRESHOLDS = np.minimum(
  0.0089 * _TINT_SQUARES, 0.03 * np.min(_TINT_DISTANCES, -1)
).astype(np.float32)
# Mean squared difference to the background above which a cell is not blank.
MARKED = 0.008


@flax.struct.dataclass
class Objects:
  """The objects in the 9 cells of a batch of images."""

  shape: (
    jax.Array
  )  # [B, 9] int32 index into SHAPES, -1 where there is no object
  color: (
    jax.Array
  )  # [B, 9] int32 index into COLORS, -1 where there is no object
  box: jax.Array  # [B, 9, 4] float32 y0, x0, y1, x1 in pixels of the canvas
  error: (
    jax.Array
  )  # [B, 9] float32 mean squared difference to the nearest drawing


@flax.struct.dataclass
class Target:
  """What prompts ask for: up to K include items and E exclude items, int32."""

  item_shape: jax.Array  # [..., K] index into SHAPES
  item_color: (
    jax.Array
  )  # [..., K] index into COLORS, -1 where any colour will do
  item_count: jax.Array  # [..., K] number of objects; 0 where there is no item
  item_relation: (
    jax.Array
  )  # [..., K] index into RELATIONS, -1 where there is none
  item_other: jax.Array  # [..., K] the item that this one stands in relation to
  exclude_shape: jax.Array  # [..., E] index into SHAPES
  exclude_count: (
    jax.Array
  )  # [..., E] fewer are allowed; 0 where there is no item


# --- Prompts as arrays ---------------------------------------------------------------------------


def encode_records(prompts_to_encode: Sequence[records.Prompt]) -> Target:
  """Turns prompts of this world into arrays.

  Args:
    prompts_to_encode: see `prompts.py`.

  Returns:
    A numpy Target of arrays [n, MAX_ITEMS or MAX_EXCLUDES].

  Raises:
    ValueError: a prompt names an unknown class, colour or relation, has too many items or none, a
      count below 1, a relation to itself or to an item that does not exist, or excludes as few
      objects as it asks for. The message holds the prompt.
  """
  rows = []
  for prompt in prompts_to_encode:
    try:
      rows.append(_encode_record(prompt))
    except (KeyError, ValueError) as error:
      raise ValueError(
        f"cannot encode the record {prompt.to_json()}: {error}"
      ) from error
  return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


def _encode_record(prompt: records.Prompt) -> Target:
  """Turns one prompt into arrays [MAX_ITEMS or MAX_EXCLUDES].

  Raises:
    ValueError: see `encode_records`; the message does not name the prompt.
  """
  if not prompt.include:
    raise ValueError(
      "the field include is missing, by which images are verified"
    )
  num_items = len(prompt.include)
  num_excludes = len(prompt.exclude)
  if not 1 <= num_items <= MAX_ITEMS or num_excludes > MAX_EXCLUDES:
    raise ValueError(
      f"it must have 1 to {MAX_ITEMS} include and at most {MAX_EXCLUDES} exclude "
      f"items, got {num_items} and {num_excludes}"
    )
  no_item = np.int32([-1, -1, 0, -1, 0])
  items = np.tile(no_item, (MAX_ITEMS, 1))
  for row, item in enumerate(prompt.include):
    relation, other = item.position or (None, 0)
    if relation is not None and (other == row or not 0 <= other < num_items):
      raise ValueError(
        f"item {row} must stand in relation to another item, got index {other}"
      )
    items[row] = (
      _index(scenes.SHAPES, item.class_name),
      _index(scenes.COLORS, item.color),
      _count(item),
      _index(prompts.RELATIONS, relation),
      other,
    )
  no_exclude = np.int32([-1, 0])
  excludes = np.tile(no_exclude, (MAX_EXCLUDES, 1))
  for row, item in enumerate(prompt.exclude):
    needed = sum(
      other.count
      for other in prompt.include
      if other.class_name == item.class_name
    )
    if _count(item) <= needed:
      raise ValueError(
        f"it excludes {item.count} of {item.class_name} but asks for {needed}"
      )
    excludes[row] = (_index(scenes.SHAPES, item.class_name), item.count)
  return Target(*items.T, *excludes.T)


def _index(words: tuple[str, ...], word: str | None) -> int:
  """Returns the place of `word` among `words`, -1 for None.

  Raises:
    ValueError: the word is unknown.
  """
  if word is None:
    return -1
  if word not in words:
    raise ValueError(f"{word!r} must be one of {words}")
  return words.index(word)


def _count(item: records.Expectation) -> int:
  """Returns the item's count.

  Raises:
    ValueError: it is below 1.
  """
  if item.count < 1:
    raise ValueError(f"counts must be at least 1, got {item.count}")
  return item.count


# --- Objects of images ---------------------------------------------------------------------------


def detect(images: types.Images) -> Objects:
  """Finds the object of every cell: the nearest drawing, if it is near enough.

  With x the cell and d_c the colour c, both minus the background, and m the coverage of a drawing,

    |x - m d_c|² = |x|² - 2 Σ_p m_p (x_p · d_c) + |m|² |d_c|²,

  so that all drawings cost one matrix product. The colour is that of the nearest drawing on the
  pixel grid. Then all drawings of that colour, at half pixels too, are compared: [B * 9, 256] by
  [256, drawings].

  Args:
    images: uint8 [B, 48, 48, 3].

  Returns:
    The objects, at most one per cell.
  """
  cells = _cells(images)  # [B, 9, 256, 3]
  color = _nearest_color(cells)
  masks, boxes = _drawings(step=0.5)
  tint = jnp.asarray(_TINTS)[color]  # [B, 9, 3]
  overlap = _dot("bnp,tp->bnt", _dot("bnpk,bnk->bnp", cells, tint), masks)
  # [B, 9, drawings]
  drawing_squares = jnp.sum(tint**2, -1, keepdims=True) * np.sum(masks**2, 1)
  cell_squares = jnp.sum(cells**2, (2, 3))[..., None]
  distance = cell_squares - 2 * overlap + drawing_squares
  nearest = jnp.argmin(distance, -1)
  error = jnp.min(distance, -1) / cells[0, 0].size
  is_object = error < jnp.asarray(THRESHOLDS)[color]
  num_drawings_of_shape = len(masks) // len(scenes.SHAPES)
  shape = nearest // num_drawings_of_shape
  rows_and_columns = np.divmod(np.arange(len(scenes.CELLS)), scenes.GRID)
  corner = scenes.CELL * np.stack(rows_and_columns, 1)
  return Objects(
    shape=jnp.where(is_object, shape, -1).astype(jnp.int32),
    color=jnp.where(is_object, color, -1).astype(jnp.int32),
    box=jnp.asarray(boxes)[nearest] + np.tile(corner, 2).astype(np.float32),
    error=error,
  )


def _cells(images: types.Images) -> jax.Array:
  """Cuts canvases into cells and subtracts the background.

  Args:
    images: uint8 [B, 48, 48, 3].

  Returns:
    float32 [B, 9, 256, 3], row-major cells and pixels; 0 is background.
  """
  pixels = images.astype(jnp.float32) / 255 - _BACKGROUND / 255
  batch, *_, channels = pixels.shape
  split = pixels.reshape(
    batch, scenes.GRID, scenes.CELL, scenes.GRID, scenes.CELL, channels
  )
  return jnp.swapaxes(split, 2, 3).reshape(
    batch, len(scenes.CELLS), scenes.CELL**2, channels
  )


def _nearest_color(cells: jax.Array) -> jax.Array:
  """Returns the colour of the nearest drawing on the pixel grid, [B, 9]."""
  masks, _ = _drawings(step=1)
  overlap = _dot("bncp,tp->bnct", _dot("bnpk,ck->bncp", cells, _TINTS), masks)
  # [colors, drawings]
  drawing_squares = _TINT_SQUARES[:, None] * np.sum(masks**2, 1)
  return jnp.argmin(jnp.min(drawing_squares - 2 * overlap, -1), -1)


# Float32 products also where an accelerator would round the factors.
_dot = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


@functools.cache
def _drawings(step: float) -> tuple[np.ndarray, np.ndarray]:
  """Returns every drawing whose size and place are multiples of `step` pixels, shape by shape.

  Places are those of the world's jitter and half a pixel beyond, inside the cell.

  Returns:
    float32 coverages [T, 256] and boxes [T, 4] (y0, x0, y1, x1 in the cell). Drawing t has the
    shape t // (T / len(SHAPES)).
  """
  num_shapes = len(scenes.SHAPES)
  masks = []
  boxes = []
  smallest, largest = scenes.SIZES[0], scenes.SIZES[-1]
  for size in np.arange(smallest, largest + step / 2, step):
    room = scenes.CELL - size
    middle = room / 2
    reach = scenes.JITTER + 0.5
    first = np.ceil(max(0, middle - reach) / step) * step
    last = min(room, middle + reach)
    starts = np.arange(first, last + 1e-6, step)
    for top, left in itertools.product(starts, starts):
      masks.append(scenes.coverage(size, top, left).reshape(num_shapes, -1))
      boxes.append((top, left, top + size, left + size))
  masks_by_shape = np.stack(masks, 1).reshape(-1, scenes.CELL**2)
  return masks_by_shape, np.tile(np.float32(boxes), (num_shapes, 1))


# --- Scores --------------------------------------------------------------------------------------


def verify(images: types.Images, targets: Target) -> types.Score:
  """Scores images by what prompts ask for.

  Adds to the parts of `score` the part `clutter`: the share of cells that hold something which is
  no object. Clutter is nothing that was asked for, so `strict` refuses it. The value ignores it
  (`reward.clutter_weight` may lower it): a rising share shows a policy that hides its mistakes.

  Args:
    images: uint8 [B, 48, 48, 3].
    targets: of their prompts, arrays [B, ...].
  """
  objects = detect(images)
  cells = _cells(images)
  is_marked = jnp.mean(cells**2, (2, 3)) > MARKED
  clutter = jnp.mean(is_marked & (objects.shape < 0), -1)
  result = score(objects, targets)
  strict = jnp.where(clutter > 0, 0.0, result.parts["strict"])
  parts = result.parts | {"strict": strict, "clutter": clutter}
  return result.replace(parts=parts)


def score(objects: Objects, targets: Target) -> types.Score:
  """Judges the objects of images by what prompts ask for.

  Every item makes a count clause over its class; a colour clause over its class and colour, if it
  names a colour; and a position clause, if it names a relation. Count and colour clauses are worth
  max(0, 1 - |need - count| / need), where items of one class (and colour) are counted together; a
  position clause is worth 1 or 0.

    value = mean of the clauses / (1 + objects of classes that no item names)

  Parts: `strict` is 1 where every clause is 1 and no object is of a class that no item names, which
  is where the value is 1 (every exclude then holds by itself). `correct` is GenEval's official
  rule: at least as many as asked for, of the colour, in the relation, and fewer than every exclude
  says. Where GenEval looks at the most confident detections, any will do, because objects here have
  no confidence.

  Args:
    objects: of B images.
    targets: of their prompts, arrays [B, ...].

  Returns:
    The score; it is always valid.
  """
  is_item = targets.item_count > 0  # [B, K]
  has_color = is_item & (targets.item_color >= 0)
  has_relation = targets.item_relation >= 0

  # Which object belongs to which item, [B, K, 9].
  of_class = is_item[..., None] & (
    targets.item_shape[..., None] == objects.shape[:, None]
  )
  of_color = ~has_color[..., None] | (
    targets.item_color[..., None] == objects.color[:, None]
  )
  fits = of_class & of_color
  class_count = jnp.sum(of_class, -1)  # [B, K]
  fits_count = jnp.sum(fits, -1)  # [B, K]
  is_related = _is_related(objects.box, fits, targets)

  # Items of one class share its objects, so their needs are added up.
  same_class = targets.item_shape[..., None] == targets.item_shape[:, None]
  same_color = targets.item_color[..., None] == targets.item_color[:, None]
  class_need = _sum_over(same_class, targets.item_count)
  count_clause = _closeness(class_need, class_count)
  color_need = _sum_over(same_class & same_color, targets.item_count)
  color_clause = _closeness(color_need, fits_count)
  position_clause = is_related.astype(jnp.float32)
  clauses = jnp.stack([count_clause, color_clause, position_clause], -1)
  counts = jnp.stack([is_item, has_color, has_relation], -1)  # [B, K, 3]

  is_named = jnp.any(of_class, 1)  # [B, 9]
  num_extra = jnp.sum((objects.shape >= 0) & ~is_named, -1)
  mean = jnp.sum(clauses, (1, 2), where=counts) / jnp.sum(counts, (1, 2))
  strict = jnp.all(clauses == 1, (1, 2), where=counts) & (num_extra == 0)
  is_enough = (
    (class_count >= targets.item_count)
    & (fits_count >= targets.item_count)
    & (is_related | ~has_relation)
  )
  correct = jnp.all(is_enough, -1) & jnp.all(
    _exclude_holds(objects, targets), -1
  )
  return types.Score(
    parts={
      "correct": correct.astype(jnp.float32),
      "strict": strict.astype(jnp.float32),
    },
    value=mean / (1 + num_extra),
    valid=jnp.ones_like(strict),
  )


def _closeness(need: jax.Array, count: jax.Array) -> jax.Array:
  """Returns max(0, 1 - |need - count| / need); `need` 0 counts as 1."""
  need = jnp.maximum(need, 1)
  return jnp.maximum(0.0, 1 - jnp.abs(need - count) / need)


def _sum_over(same: jax.Array, counts: jax.Array) -> jax.Array:
  """Returns for every item the sum of the counts [B, K] of the items that are `same` [B, K, K]."""
  return jnp.sum(jnp.where(same, counts[:, None], 0), -1)


def _is_related(box: jax.Array, fits: jax.Array, targets: Target) -> jax.Array:
  """Returns whether an object of an item is in its relation to one of the other item, [B, K].

  Args:
    box: of the objects, [B, 9, 4].
    fits: which object belongs to which item, [B, K, 9].
    targets: arrays [B, ...].
  """
  relation = jnp.maximum(targets.item_relation, 0)[..., None, None]
  holds = jnp.take_along_axis(relations(box), relation, 1)  # [B, K, 9, 9]
  other_item = targets.item_other[..., None]
  fits_other = jnp.take_along_axis(fits, other_item, 1)  # [B, K, 9]
  return jnp.any(holds & fits[..., None] & fits_other[..., None, :], (2, 3))


def _exclude_holds(objects: Objects, targets: Target) -> jax.Array:
  """Returns whether there are fewer objects of the class than an exclude says, [B, E]."""
  is_excluded = targets.exclude_shape[..., None] == objects.shape[:, None]
  count = jnp.sum(is_excluded, -1)
  return (count < targets.exclude_count) | (targets.exclude_count == 0)


def relations(box: jax.Array) -> jax.Array:
  """Returns which relations hold between boxes, by GenEval's rule.

  With d the offset of A's centre from B's: r = sign(d) max(|d| - .1 (size A + size B), 0) / |d|₂
  per axis. A is left of (right of, above, below) B where the component of r along that direction is
  greater than .5. A box has no relation to itself.

  Args:
    box: float [B, O, 4] of y0, x0, y1, x1.

  Returns:
    bool [B, R, O (A), O (B)]; R is in the order of RELATIONS.
  """
  center = (box[..., :2] + box[..., 2:]) / 2
  size = box[..., 2:] - box[..., :2]
  offset = center[:, :, None] - center[:, None]  # [B, A, B, 2]
  distance = jnp.abs(offset)
  margin = 0.1 * (size[:, :, None] + size[:, None])
  shrunk = jnp.maximum(distance - margin, 0.0) * jnp.sign(offset)
  norm = jnp.linalg.norm(offset, axis=-1, keepdims=True)
  is_near = jnp.all(jnp.abs(shrunk) < 1e-3, -1, keepdims=True)
  direction = jnp.where(is_near, 0.0, shrunk / jnp.maximum(norm, 1e-3))
  y, x = jnp.moveaxis(direction, -1, 0)
  return jnp.stack([x < -0.5, x > 0.5, y < -0.5, y > 0.5], 1)

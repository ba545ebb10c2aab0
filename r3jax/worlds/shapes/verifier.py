"""Verifies images of the embedded world against GenEval records, exactly and in-graph.

`detect` finds the objects by nearest drawing, `score` judges them by GenEval's rules (R3.md section
10), `verify` does both. All three are pure functions of arrays and can be jitted; `encode_records`
makes the arrays of a batch of records beforehand.
"""

from collections.abc import Sequence
import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from r3jax import types
from r3jax.data import records as records_lib
from r3jax.worlds.shapes import prompts
from r3jax.worlds.shapes import scenes

PARTS = ("correct", "strict", "clutter")  # of what `verify` returns
MAX_ITEMS = 3
MAX_EXCLUDES = 2

# A cell holds an object if the mean squared difference of its 768 numbers in [0, 1] to the nearest
# drawing is below the threshold of its colour. Drawings stand at half pixels and have half sizes in
# between, because a model's objects do. With d_c the colour minus the background, the least
# differences over all sizes and offsets of what is *not* the object: half an object to any drawing
# .0211 |d_c|², another class of the same colour .0230 |d_c|², a blank cell .0599 |d_c|², the same
# class in the colour b .0600 |d_b - d_c|². The thresholds are below half of every one of them; they
# follow the contrast, as the eye does. A true object behind an autoencoder of RMS error e differs by
# e²: .0036 at .06, and yellow, the faintest, is lost from .089 on.
# d_c, [colors, 3]
_TINTS = (np.float32(scenes.PALETTE) - np.float32(scenes.BACKGROUND)) / 255
_APART = np.sum((_TINTS[:, None] - _TINTS) ** 2, -1) + 9 * np.eye(len(_TINTS))
THRESHOLDS = np.minimum(
  0.0089 * np.sum(_TINTS**2, -1), 0.03 * np.min(_APART, -1)
).astype(np.float32)
# mean squared difference to the background from which on a cell is not blank
MARKED = 0.008


@flax.struct.dataclass
class Objects:
  """Holds what was found in each of the 9 cells of a batch of images."""

  # int32 [B, 9] index into SHAPES, -1 where nothing was found.
  shape: jax.Array
  # int32 [B, 9] index into COLORS, -1 where nothing was found.
  color: jax.Array
  # float32 [B, 9, 4] y0, x0, y1, x1 in canvas pixels; ends are exclusive.
  box: jax.Array
  # float32 [B, 9] mean squared difference to the nearest drawing, in [0, 1].
  error: jax.Array


@flax.struct.dataclass
class Target:
  """Holds what prompts ask for: up to K include items and E exclude items, all int32."""

  item_shape: jax.Array  # [..., K] index into SHAPES.
  # [..., K] index into COLORS, -1 where any colour will do.
  item_color: jax.Array
  # [..., K] objects asked for; 0 where the item is absent.
  item_count: jax.Array
  # [..., K] index into RELATIONS, -1 where the place is free.
  item_relation: jax.Array
  item_other: jax.Array  # [..., K] the item this one stands in relation to.
  exclude_shape: jax.Array  # [..., E] index into SHAPES.
  # [..., E] fewer than this many may be there; 0 = exclude absent.
  exclude_count: jax.Array


def encode_records(records: Sequence[records_lib.Prompt]) -> Target:
  """Turns GenEval records into arrays.

  Args:
    records: prompts of this world, see `prompts.py`.

  Returns:
    A numpy Target of arrays [len(records), MAX_ITEMS or MAX_EXCLUDES].

  Raises:
    ValueError: if a record names an unknown class, colour or relation, has too many items or
      none, a count below 1, a relation to itself or to an item that is not there, or excludes as
      few objects as it asks for. The message holds the record.
  """
  rows = []
  for record in records:
    try:
      rows.append(_encode_record(record))
    except (KeyError, ValueError) as error:
      raise ValueError(
        f"cannot encode the record {record.to_json()}: {error}"
      ) from error
  return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


def detect(images: types.Images) -> Objects:
  """Finds the object of every cell: the nearest drawing, if it is near enough.

  With x the cell and d_c the colour c, both minus the background, and m the coverage of a drawing:
  |x - m d_c|² = |x|² - 2 Σ_p m_p (x_p · d_c) + |m|² |d_c|², so that all drawings cost one matmul.
  The colour is that of the nearest drawing on the pixel grid; then all drawings of that colour, at
  half pixels too, are compared: [B * 9, 256] by [256, drawings].

  Args:
    images: uint8 [B, 48, 48, 3].

  Returns:
    The objects, one at most per cell.
  """
  background = np.float32(scenes.BACKGROUND) / 255
  # [B, 9, 256, 3]
  cells = _cells(images.astype(jnp.float32) / 255 - background)
  color = _nearest_color(cells, _TINTS)
  masks, boxes = _drawings(step=0.5)
  tint = jnp.asarray(_TINTS)[color]  # [B, 9, 3]
  overlap = _dot("bnp,tp->bnt", _dot("bnpk,bnk->bnp", cells, tint), masks)
  # [B, 9, drawings]
  energy = jnp.sum(tint**2, -1, keepdims=True) * np.sum(masks**2, 1)
  squares = jnp.sum(cells**2, (2, 3))[..., None] - 2 * overlap + energy
  nearest, error = (
    jnp.argmin(squares, -1),
    jnp.min(squares, -1) / cells[0, 0].size,
  )
  found = error < jnp.asarray(THRESHOLDS)[color]
  shape = nearest // (len(masks) // len(scenes.SHAPES))
  corner = scenes.CELL * np.stack(
    np.divmod(np.arange(len(scenes.CELLS)), scenes.GRID), 1
  )
  return Objects(
    shape=jnp.where(found, shape, -1).astype(jnp.int32),
    color=jnp.where(found, color, -1).astype(jnp.int32),
    box=jnp.asarray(boxes)[nearest] + np.tile(corner, 2).astype(np.float32),
    error=error,
  )


_dot = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def _nearest_color(cells: jax.Array, tints: np.ndarray) -> jax.Array:
  """Returns the colour of the nearest drawing on the pixel grid, [B, 9]."""
  masks, _ = _drawings(step=1)
  overlap = _dot("bncp,tp->bnct", _dot("bnpk,ck->bncp", cells, tints), masks)
  # [colors, drawings]
  energy = np.sum(tints**2, 1)[:, None] * np.sum(masks**2, 1)
  return jnp.argmin(jnp.min(energy - 2 * overlap, -1), -1)


def score(objects: Objects, targets: Target) -> types.Score:
  """Judges objects by what was asked for.

  Every present item makes a count clause over its class, a colour clause over its class and
  colour if it names one (both max(0, 1 - |need - found| / need); items of one class, or of one
  class and colour, are counted together), and a position clause, 1 or 0, if it names a relation.

    value = mean of the clauses / (1 + objects of classes no item names)

  Parts: `strict`, 1 where every clause is 1 and nothing is extra, which is where value is 1 (an
  exclude then holds by itself); `correct`, GenEval's official rule: at least as many as asked, of
  the colour, in the relation, and fewer than every exclude says. Detections here have no
  confidence, so where GenEval looks at the most confident objects, any will do.

  Args:
    objects: what was found in B images.
    targets: what was asked of them, arrays [B, ...].

  Returns:
    The score; it is always valid.
  """
  present = targets.item_count > 0
  has_color, has_relation = (
    present & (targets.item_color >= 0),
    targets.item_relation >= 0,
  )
  of_class = present[..., None] & (
    targets.item_shape[..., None] == objects.shape[:, None]
  )
  fits = of_class & (
    ~has_color[..., None]
    # [B, K, 9]
    | (targets.item_color[..., None] == objects.color[:, None])
  )
  class_found, fits_found = jnp.sum(of_class, -1), jnp.sum(fits, -1)  # [B, K]
  related = _related(objects.box, fits, targets)
  same_class = targets.item_shape[..., None] == targets.item_shape[:, None]
  same_color = targets.item_color[..., None] == targets.item_color[:, None]
  clauses = jnp.stack(
    [
      _closeness(_together(same_class, targets.item_count), class_found),
      _closeness(
        _together(same_class & same_color, targets.item_count), fits_found
      ),
      related.astype(jnp.float32),
    ],
    -1,
  )  # [B, K, 3]
  asked = jnp.stack([present, has_color, has_relation], -1)
  named = jnp.any(of_class, 1)  # [B, 9]
  extra = jnp.sum((objects.shape >= 0) & ~named, -1)
  mean = jnp.sum(clauses, (1, 2), where=asked) / jnp.sum(asked, (1, 2))
  strict = jnp.all(clauses == 1, (1, 2), where=asked) & (extra == 0)
  enough = (
    (class_found >= targets.item_count)
    & (fits_found >= targets.item_count)
    & (related | ~has_relation)
  )
  correct = jnp.all(enough, -1) & jnp.all(_excludes_hold(objects, targets), -1)
  parts = {
    "correct": correct.astype(jnp.float32),
    "strict": strict.astype(jnp.float32),
  }
  return types.Score(
    value=mean / (1 + extra), valid=jnp.ones_like(strict), parts=parts
  )


def verify(images: types.Images, targets: Target) -> types.Score:
  """Scores images, uint8 [B, 48, 48, 3], by their targets, arrays [B, ...].

  Adds the part `clutter`: the share of cells that hold something which is no object. It costs
  nothing, so a rising share shows a policy that hides its mistakes.
  """
  objects = detect(images)
  background = np.float32(scenes.BACKGROUND) / 255
  cells = _cells(images.astype(jnp.float32) / 255 - background)
  marked = jnp.mean(cells**2, (2, 3)) > MARKED
  clutter = jnp.mean(marked & (objects.shape < 0), -1)
  found = score(objects, targets)
  return found.replace(parts=found.parts | {"clutter": clutter})


def relations(box: jax.Array) -> jax.Array:
  """Tells which relations hold between boxes, by GenEval's rule.

  With d the offset of A's centre from B's: r = sign(d) max(|d| - .1 (size A + size B), 0) / |d|₂
  per axis; A is left of (right of, above, below) B where the component of r along that direction
  is beyond .5. A box has no relation to itself.

  Args:
    box: float [B, O, 4] of y0, x0, y1, x1.

  Returns:
    bool [B, R, O (A), O (B)]; R is in the order of RELATIONS.
  """
  center, size = (box[..., :2] + box[..., 2:]) / 2, box[..., 2:] - box[..., :2]
  d = center[:, :, None] - center[:, None]  # [B, A, B, 2]
  shrunk = jnp.maximum(
    jnp.abs(d) - 0.1 * (size[:, :, None] + size[:, None]), 0.0
  ) * jnp.sign(d)
  norm = jnp.linalg.norm(d, axis=-1, keepdims=True)
  near = jnp.all(jnp.abs(shrunk) < 1e-3, -1, keepdims=True)
  y, x = jnp.moveaxis(
    jnp.where(near, 0.0, shrunk / jnp.maximum(norm, 1e-3)), -1, 0
  )
  return jnp.stack([x < -0.5, x > 0.5, y < -0.5, y > 0.5], 1)


def _encode_record(record: records_lib.Prompt) -> Target:
  """Turns one record into arrays [MAX_ITEMS or MAX_EXCLUDES]; raises without naming it."""
  include, exclude = record.include, record.exclude
  if not 1 <= len(include) <= MAX_ITEMS or len(exclude) > MAX_EXCLUDES:
    raise ValueError(
      f"it must have 1 to {MAX_ITEMS} include and at most {MAX_EXCLUDES} exclude "
      f"items, got {len(include)} and {len(exclude)}"
    )
  items = np.tile(np.int32([-1, -1, 0, -1, 0]), (MAX_ITEMS, 1))
  for k, item in enumerate(include):
    relation, other = item.position or (None, 0)
    if relation is not None and (other == k or not 0 <= other < len(include)):
      raise ValueError(
        f"item {k} must stand in relation to another item, got index {other}"
      )
    items[k] = (
      _index(scenes.SHAPES, item.class_name),
      _index(scenes.COLORS, item.color),
      _count(item),
      _index(prompts.RELATIONS, relation),
      other,
    )
  excludes = np.tile(np.int32([-1, 0]), (MAX_EXCLUDES, 1))
  for e, item in enumerate(exclude):
    needed = sum(
      other.count for other in include if other.class_name == item.class_name
    )
    if _count(item) <= needed:
      raise ValueError(
        f"it excludes {item.count} of {item.class_name} but asks for {needed}"
      )
    excludes[e] = _index(scenes.SHAPES, item.class_name), item.count
  return Target(*items.T, *excludes.T)


def _index(words: tuple[str, ...], word: str | None) -> int:
  """Returns the place of `word` among `words`, -1 for None; raises ValueError if unknown."""
  if word is None:
    return -1
  if word not in words:
    raise ValueError(f"{word!r} must be one of {words}")
  return words.index(word)


def _count(item: records_lib.Expectation) -> int:
  """Returns the item's count; raises ValueError if it is below 1."""
  if item.count < 1:
    raise ValueError(f"counts must be at least 1, got {item.count}")
  return item.count


@functools.cache
def _drawings(step: float) -> tuple[np.ndarray, np.ndarray]:
  """Returns every drawing of sizes and places that are multiples of `step`, shape by shape.

  Places are those of the world's jitter and half a pixel beyond, inside the cell.

  Returns:
    float32 coverages [T, 256] and boxes [T, 4] (y0, x0, y1, x1 in the cell); drawing t is of shape
    t // (T / len(SHAPES)).
  """
  masks, boxes = [], []
  for size in np.arange(scenes.SIZES[0], scenes.SIZES[-1] + step / 2, step):
    middle, reach = (scenes.CELL - size) / 2, scenes.JITTER + 0.5
    first = np.ceil(max(0, middle - reach) / step) * step
    starts = np.arange(
      first, min(scenes.CELL - size, middle + reach) + 1e-6, step
    )
    for top in starts:
      for left in starts:
        masks.append(
          scenes.coverage(size, top, left).reshape(len(scenes.SHAPES), -1)
        )
        boxes.append((top, left, top + size, left + size))
  boxes = np.tile(np.float32(boxes), (len(scenes.SHAPES), 1))
  return np.stack(masks, 1).reshape(-1, scenes.CELL**2), boxes


def _cells(pixels: jax.Array) -> jax.Array:
  """Cuts canvases [B, 48, 48, C] into cells [B, 9, 256, C]."""
  batch, *_, channels = pixels.shape
  split = pixels.reshape(
    batch, scenes.GRID, scenes.CELL, scenes.GRID, scenes.CELL, channels
  )
  return jnp.swapaxes(split, 2, 3).reshape(
    batch, len(scenes.CELLS), scenes.CELL**2, channels
  )


def _closeness(need: jax.Array, found: jax.Array) -> jax.Array:
  """Returns max(0, 1 - |need - found| / need); `need` 0 counts as 1."""
  need = jnp.maximum(need, 1)
  return jnp.maximum(0.0, 1 - jnp.abs(need - found) / need)


def _together(same: jax.Array, count: jax.Array) -> jax.Array:
  """Returns, for every item, the counts [B, K] of the items that are the `same` [B, K, K]."""
  return jnp.sum(jnp.where(same, count[:, None], 0), -1)


def _related(box: jax.Array, fits: jax.Array, targets: Target) -> jax.Array:
  """Tells [B, K] if any object that fits an item is in its relation to one of the other item."""
  relation = jnp.maximum(targets.item_relation, 0)[..., None, None]
  holds = jnp.take_along_axis(relations(box), relation, 1)  # [B, K, 9, 9]
  # [B, K, 9]
  others = jnp.take_along_axis(fits, targets.item_other[..., None], 1)
  return jnp.any(holds & fits[..., None] & others[..., None, :], (2, 3))


def _excludes_hold(objects: Objects, targets: Target) -> jax.Array:
  """Tells [B, E] if fewer objects of the class were found than the exclude says."""
  found = jnp.sum(
    targets.exclude_shape[..., None] == objects.shape[:, None], -1
  )
  return (found < targets.exclude_count) | (targets.exclude_count == 0)

"""Joint attention on CPUs: a row and a key/value head at a time, in plain products of matrices.

XLA's CPU backend multiplies two matrices several times as fast as two stacks of them, and the
scores of one head stay in a core's cache. Blocks of queries meet the keys that the layout's static
structure shows them, so that hidden pairs cost nothing. `attention.attend` is the same function for
every platform: the two agree, to rounding, where a slot holds a token.
"""

from collections.abc import Sequence
import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from r3jax import types
from r3jax.model import attention
from r3jax.parallel import sharding
from r3jax.sequence import segments

_BLOCK = 512  # query slots of a block at most
# Pairs that a block may compute in vain: about what the operations of one more block cost.
_NEGLIGIBLE_PAIRS = 2**14
# Score of a hidden pair. Not -inf: a slot that sees nothing would become NaN, and its gradient too.
_HIDDEN = -1e30


def attend(
  query: types.Heads, sources: Sequence[attention.Source]
) -> types.Heads:
  """Attends to the union of the sources, as `attention.attend`.

  A slot that holds no token gets a mean of values, which no result depends on. Scores are never
  stored: the backward pass computes those of a head again.

  Args:
    query: [B, T, H, d] in any dtype.
    sources: with masks in halves; the last one holds the queries' own slots.

  Returns:
    [B, T, H, d] in the dtype of the values.
  """
  # The compiler would gather what a loop over rows and heads reads. In a narrow type, tokens are
  # decoded and scored alike only if both round the weights alike.
  dtype = sources[0].key.dtype
  is_narrow = dtype != jnp.promote_types(dtype, jnp.float32)
  if sharding.is_partitioned() or is_narrow:
    return attention.attend(query, sources)
  rows, slots, heads, width = query.shape
  masks = [source.mask for source in sources]
  views = []
  filled = []
  for mask in masks:
    if not isinstance(mask, segments.Mask):
      raise TypeError(
        "attention by heads needs masks in halves, not whole ones"
      )
    views.append(mask.view)
    filled.append(mask.filled)
  keys = tuple(source.key for source in sources)
  values = tuple(source.value for source in sources)
  kv_heads = keys[0].shape[2]
  folded = query.astype(dtype).reshape(
    rows, slots, kv_heads, heads // kv_heads, width
  )
  mixed = _attend(
    tuple(views), folded, keys, values, jnp.concatenate(filled, axis=1)
  )
  return jnp.asarray(mixed).reshape(rows, slots, heads, width)


@dataclasses.dataclass(frozen=True, eq=False)
class _Block:
  """Query slots that are computed together, and the keys that they meet.

  Attributes:
    slots: runs of query slots.
    keys: runs of keys, over all sources.
    visible: which of the slots see which of the keys, [t, s]; None where each sees all.
  """

  slots: tuple[slice, ...]
  keys: tuple[slice, ...]
  visible: np.ndarray | None


@functools.cache
def _blocks(views: tuple[segments.View, ...]) -> tuple[_Block, ...]:
  """Cuts the queries into blocks: one per segment, the small ones together."""
  visible = np.concatenate([view.visible() for view in views], axis=1)
  own = views[-1]
  segment = own.layout.slots(own.queries).segment
  parts = []
  for index in dict.fromkeys(segment.tolist()):
    slots = np.flatnonzero(segment == index)
    parts += np.split(slots, range(_BLOCK, len(slots), _BLOCK))
  parts = _merged(parts, visible)

  blocks = []
  for slots in parts:
    keys = np.flatnonzero(visible[slots].any(axis=0))
    table = visible[np.ix_(slots, keys)]
    is_whole = bool(table.all())
    visible_keys = None if is_whole else table
    blocks.append(_Block(_runs(slots), _runs(keys), visible_keys))
  return tuple(blocks)


def _merged(parts: list[np.ndarray], visible: np.ndarray) -> list[np.ndarray]:
  """Joins blocks, the cheapest pair first, as long as that adds a negligible number of pairs."""

  def num_pairs(slots: np.ndarray) -> int:
    return len(slots) * int(visible[slots].any(axis=0).sum())

  parts = list(parts)
  while len(parts) > 1:
    candidates = []
    for i, j in itertools.combinations(range(len(parts)), 2):
      joined = np.union1d(parts[i], parts[j])
      apart = num_pairs(parts[i]) + num_pairs(parts[j])
      added = num_pairs(joined) - apart
      if len(joined) <= _BLOCK and added <= _NEGLIGIBLE_PAIRS:
        candidates.append((added, i, j))
    if not candidates:
      break
    _, i, j = min(candidates)
    second = parts.pop(j)
    parts[i] = np.union1d(parts[i], second)
  return parts


def _runs(indices: np.ndarray) -> tuple[slice, ...]:
  """Returns the runs of consecutive numbers in sorted indices."""
  breaks = np.flatnonzero(np.diff(indices) > 1) + 1
  runs = np.split(indices, breaks)
  return tuple(slice(int(run[0]), int(run[-1]) + 1) for run in runs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
  views: tuple[segments.View, ...],
  query: jax.Array,
  keys: tuple[jax.Array, ...],
  values: tuple[jax.Array, ...],
  filled: jax.Array,
) -> jax.Array:
  """Attends, [B, T, K, H/K, d]; arrays of a source are [G, S, K, d], `filled` is [B, all S]."""
  mixed, _ = _forward(views, query, keys, values, filled)
  return mixed


def _forward(
  views: tuple[segments.View, ...],
  query: jax.Array,
  keys: tuple[jax.Array, ...],
  values: tuple[jax.Array, ...],
  filled: jax.Array,
) -> tuple[jax.Array, Any]:
  """Returns what `_attend` returns, and what the backward pass needs."""
  blocks = _blocks(views)
  rows, _, kv_heads, _, _ = query.shape
  wide = jnp.promote_types(query.dtype, jnp.float32)

  def attend_head(index: jax.Array, results: tuple) -> tuple:
    mixed, largest, total = results
    row, head = jnp.divmod(index, kv_heads)
    key = _all_keys(keys, row, rows, head)
    value = _all_keys(values, row, rows, head)
    row_filled = jax.lax.dynamic_index_in_dim(filled, row, keepdims=False)
    for block in blocks:
      block_query = _of_head(query, block.slots, row, head)
      scores = _scores(block, block_query, key, row_filled)
      block_largest = scores.max(axis=-1, keepdims=True)
      weights = jnp.exp(scores - block_largest)
      block_total = weights.sum(axis=-1, keepdims=True)
      sums = _product(weights, _cut(value, block.keys))
      block_mixed = (sums / block_total).astype(mixed.dtype)
      mixed = _write(mixed, block_mixed, block.slots, row, head)
      largest = _write(largest, block_largest, block.slots, row, head)
      total = _write(total, block_total, block.slots, row, head)
    return mixed, largest, total

  statistics = jnp.zeros((*query.shape[:-1], 1), wide)
  start = (jnp.zeros(query.shape, values[0].dtype), statistics, statistics)
  mixed, largest, total = jax.lax.fori_loop(
    0, rows * kv_heads, attend_head, start
  )
  return mixed, (query, keys, values, filled, mixed, largest, total)


def _backward(
  views: tuple[segments.View, ...], residuals: Any, gradient: jax.Array
) -> tuple:
  """Returns the gradients of query, keys and values, given that of the result."""
  query, keys, values, filled, mixed, largest, total = residuals
  blocks = _blocks(views)
  rows, _, kv_heads, _, width = query.shape
  wide = jnp.promote_types(query.dtype, jnp.float32)
  scale = width**-0.5

  def differentiate_head(index: jax.Array, results: tuple) -> tuple:
    to_query, to_keys, to_values = results
    row, head = jnp.divmod(index, kv_heads)
    key = _all_keys(keys, row, rows, head)
    value = _all_keys(values, row, rows, head)
    row_filled = jax.lax.dynamic_index_in_dim(filled, row, keepdims=False)
    to_key = jnp.zeros(key.shape, wide)
    to_value = jnp.zeros(value.shape, wide)
    for block in blocks:

      def part(x: jax.Array, slots=block.slots) -> jax.Array:
        return _of_head(x, slots, row, head)

      block_query = part(query)
      block_key = _cut(key, block.keys)
      block_gradient = part(gradient)
      scores = _scores(block, block_query, key, row_filled)
      weights = jnp.exp(scores - part(largest)) / part(total)
      to_weights = _product(block_gradient, _cut(value, block.keys).T)
      # Of a softmax: the weight times the distance from the mean over all keys.
      agreement = block_gradient * part(mixed)
      mean = agreement.sum(axis=-1, keepdims=True)
      to_scores = weights * (to_weights - mean) * scale
      to_block = _product(to_scores, block_key).astype(to_query.dtype)
      to_query = _write(to_query, to_block, block.slots, row, head)
      to_key = _add(to_key, _transposed_product(to_scores, block_query), block)
      to_value = _add(
        to_value, _transposed_product(weights, block_gradient), block
      )
    to_keys = _add_to_sources(to_keys, to_key, row, rows, head)
    to_values = _add_to_sources(to_values, to_value, row, rows, head)
    return to_query, to_keys, to_values

  def zeros_like(arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    # In float32: the gradient of a group's row is a sum over its samples.
    return tuple(jnp.zeros(array.shape, wide) for array in arrays)

  start = (jnp.zeros_like(query), zeros_like(keys), zeros_like(values))
  to_query, to_keys, to_values = jax.lax.fori_loop(
    0, rows * kv_heads, differentiate_head, start
  )
  dtype = query.dtype
  return (
    to_query,
    tuple(x.astype(dtype) for x in to_keys),
    tuple(x.astype(values[0].dtype) for x in to_values),
    None,
  )


_attend.defvjp(_forward, _backward)


def _scores(
  block: _Block, query: jax.Array, key: jax.Array, filled: jax.Array
) -> jax.Array:
  """Returns the masked scaled scores of a block, [t, H/K, s]."""
  scale = query.shape[-1] ** -0.5
  block_key = _cut(key, block.keys)
  is_filled = _cut(filled, block.keys)
  if block.visible is None:
    # The product hides empty keys by one more column, which saves a pass over the scores.
    empty = jnp.where(is_filled, 0, _HIDDEN).astype(key.dtype)
    ones = jnp.ones((*query.shape[:-1], 1), query.dtype)
    query = jnp.concatenate([query * scale, ones], axis=-1)
    block_key = jnp.concatenate([block_key, empty[:, None]], axis=-1)
    return _product(query, block_key.T)
  scores = _product(query, block_key.T) * scale
  mask = is_filled & jnp.asarray(block.visible)
  return jnp.where(mask[:, None], scores, _HIDDEN)


def _product(x: jax.Array, matrix: jax.Array) -> jax.Array:
  """Returns x [t, R, n] times a matrix [n, m], [t, R, m]."""
  product = x.reshape(-1, x.shape[-1]) @ matrix
  return product.reshape(*x.shape[:-1], -1)


def _transposed_product(x: jax.Array, y: jax.Array) -> jax.Array:
  """Returns the sum over slots and heads of x [t, R, n] by y [t, R, m], [n, m]."""
  flat_x = x.reshape(-1, x.shape[-1])
  flat_y = y.reshape(-1, y.shape[-1])
  # Transposes y, which has few columns, instead of x.
  return (flat_y.T @ flat_x).T


def _all_keys(
  sources: tuple[jax.Array, ...], row: jax.Array, rows: int, head: jax.Array
) -> jax.Array:
  """Returns the keys (or values) that one head of one row meets, [all S, d]."""
  parts = []
  for source in sources:
    groups, size, _, width = source.shape
    start = (row // (rows // groups), 0, head, 0)
    part = jax.lax.dynamic_slice(source, start, (1, size, 1, width))
    parts.append(part.reshape(size, width))
  return jnp.concatenate(parts)


def _add_to_sources(
  sums: tuple[jax.Array, ...],
  addend: jax.Array,
  row: jax.Array,
  rows: int,
  head: jax.Array,
) -> tuple[jax.Array, ...]:
  """Adds [all S, d] to where `_all_keys` reads it."""
  results = []
  first = 0
  for total in sums:
    groups, size, _, width = total.shape
    start = (row // (rows // groups), 0, head, 0)
    shape = (1, size, 1, width)
    part = addend[first : first + size].reshape(shape)
    entry = jax.lax.dynamic_slice(total, start, shape) + part
    results.append(jax.lax.dynamic_update_slice(total, entry, start))
    first += size
  return tuple(results)


def _of_head(
  x: jax.Array, slots: tuple[slice, ...], row: jax.Array, head: jax.Array
) -> jax.Array:
  """Returns some slots of one head of one row of [B, T, K, R, d], [t, R, d]."""
  _, _, _, repeats, width = x.shape
  parts = []
  for run in slots:
    size = run.stop - run.start
    start = (row, run.start, head, 0, 0)
    part = jax.lax.dynamic_slice(x, start, (1, size, 1, repeats, width))
    parts.append(part.reshape(size, repeats, width))
  return jnp.concatenate(parts)


def _write(
  x: jax.Array,
  part: jax.Array,
  slots: tuple[slice, ...],
  row: jax.Array,
  head: jax.Array,
) -> jax.Array:
  """Writes [t, R, d] to where `_of_head` reads it."""
  first = 0
  for run in slots:
    size = run.stop - run.start
    entry = part[None, first : first + size, None]
    start = (row, run.start, head, 0, 0)
    x = jax.lax.dynamic_update_slice(x, entry, start)
    first += size
  return x


def _cut(x: jax.Array, runs: tuple[slice, ...]) -> jax.Array:
  """Returns runs of the first axis."""
  return jnp.concatenate([x[run] for run in runs])


def _add(x: jax.Array, addend: jax.Array, block: _Block) -> jax.Array:
  """Adds to where `_cut` reads the keys of a block."""
  first = 0
  for run in block.keys:
    size = run.stop - run.start
    x = x.at[run].add(addend[first : first + size])
    first += size
  return x

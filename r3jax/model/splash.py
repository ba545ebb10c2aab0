"""Joint attention by JAX's block-sparse TPU kernel ("splash attention").

The kernel skips the blocks that the layout's static structure hides and never holds the scores;
which slots hold a token goes in as segment ids. `attention.attend` is the same function in XLA's
own operations: the two agree where a slot holds a token.
"""

from collections.abc import Sequence
import functools

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_mask,
)
import jax.numpy as jnp
import numpy as np

from r3jax import types
from r3jax.model import attention
from r3jax.parallel import sharding
from r3jax.sequence import segments

_LANES = 128  # the kernel's blocks are multiples of this
_BLOCK = 512
_FILLED = 0  # segment id of slots that hold a token
_EMPTY = 1


def attend(
  query: types.Heads,
  sources: Sequence[attention.Source],
  rules: sharding.Rules,
  interpret: bool = False,
) -> types.Heads:
  """Attends to the union of the sources, as `attention.attend`; slots without a token get zeros.

  Args:
    query: [B, T, H, d] in any dtype; d is a multiple of 128 on a TPU.
    sources: with masks in halves; the last one holds the queries' own slots.
    rules: where rows and heads go; every device runs the kernel on its own.
    interpret: run the kernel in Python, for tests.

  Returns:
    [B, T, H, d] in the dtype of the values.
  """
  rows, slots, _, width = query.shape
  masks = [_halved(source.mask) for source in sources]
  table = _table(tuple(mask.view for mask in masks))
  padded_slots, padded_keys = table.shape

  # Slots attend inside their segment id only: empty keys are hidden from filled queries.
  filled = jnp.concatenate([mask.filled for mask in masks], axis=1)
  query_ids = _segment_ids(masks[-1].filled, padded_slots)
  key_ids = _segment_ids(filled, padded_keys)

  # The kernel has no shared rows and does not scale.
  keys = [_every_row(source.key, rows) for source in sources]
  values = [_every_row(source.value, rows) for source in sources]
  key = _by_head(jnp.concatenate(keys, axis=1), padded_keys)
  value = _by_head(jnp.concatenate(values, axis=1), padded_keys)
  # In float32, and rounded once: scaling a rounded query would round it twice.
  wide = query.astype(jnp.promote_types(query.dtype, jnp.float32))
  scaled = (wide * width**-0.5).astype(key.dtype)
  query = _by_head(scaled, padded_slots)

  query_spec = rules.spec(query.shape, ("rows", "heads", None, None))
  key_spec = rules.spec(key.shape, ("rows", "kv_heads", None, None))
  ids_spec = rules.spec(query_ids.shape, ("rows", None))
  run = sharding.by_hand(
    functools.partial(_run, table, interpret),
    (query_spec, key_spec, key_spec, ids_spec, ids_spec),
    query_spec,
  )
  attended = run(query, key, value, query_ids, key_ids)
  return attended[:, :, :slots].swapaxes(1, 2)


def _run(
  table: np.ndarray,
  interpret: bool,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  query_ids: jax.Array,
  key_ids: jax.Array,
) -> jax.Array:
  """Runs the kernel on [b, h, T, d] queries and [b, k, S, d] keys, a device's part of the heads."""
  rows, heads, slots, width = query.shape
  kv_heads = key.shape[1]
  folded = query.reshape(rows, kv_heads, -1, slots, width)
  block_q, block_kv = (min(_BLOCK, size) for size in table.shape)
  blocks = splash_attention_kernel.BlockSizes(
    block_q=block_q,
    block_kv=block_kv,
    block_q_dkv=block_q,
    block_kv_dkv=block_kv,
    block_q_dq=block_q,
    block_kv_dq=block_kv,
  )
  # One kernel per key/value head serves the query heads that share it.
  head_mask = splash_attention_mask.NumpyMask(table)
  mask = splash_attention_mask.MultiHeadMask([head_mask] * folded.shape[2])
  kernel = splash_attention_kernel.make_splash_mqa_single_device(
    mask, block_sizes=blocks, interpret=interpret
  )
  ids = splash_attention_kernel.SegmentIds(query_ids, key_ids)
  over_kv_heads = jax.vmap(kernel, in_axes=(0, 0, 0, None))
  over_rows = jax.vmap(over_kv_heads)
  attended = jnp.asarray(over_rows(folded, key, value, ids))
  return attended.reshape(rows, heads, slots, width)


def _halved(mask: types.Mask | segments.Mask) -> segments.Mask:
  if not isinstance(mask, segments.Mask):
    raise TypeError("the kernel needs masks in halves, not whole ones")
  return mask


def _by_head(x: jax.Array, size: int) -> jax.Array:
  """Returns [B, H, size, d] of [B, S, H, d], filled up with zeros."""
  padding = ((0, 0), (0, 0), (0, size - x.shape[1]), (0, 0))
  return jnp.pad(x.swapaxes(1, 2), padding)


def _every_row(x: jax.Array, rows: int) -> jax.Array:
  """Returns a row per sample where there was one per group."""
  # Repeated in float32: the gradient of a group's row is a sum over its samples.
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  return jnp.repeat(wide, rows // x.shape[0], axis=0).astype(x.dtype)


def _padded(size: int) -> int:
  """Returns the size in whole blocks."""
  in_lanes = -(-size // _LANES) * _LANES
  block = min(_BLOCK, in_lanes)
  return -(-size // block) * block


def _segment_ids(filled: jax.Array, size: int) -> jax.Array:
  """Returns the segment ids of `size` slots, [B, size] int32."""
  ids = jnp.where(filled, _FILLED, _EMPTY).astype(jnp.int32)
  padding = ((0, 0), (0, size - ids.shape[1]))
  return jnp.pad(ids, padding, constant_values=_EMPTY)


@functools.cache
def _table(views: tuple[segments.View, ...]) -> np.ndarray:
  """Returns which slots see which keys, filled up to whole blocks, [T, S] bool.

  Queries without a token see the empty keys at the end, so that every query sees something.
  """
  visible = np.concatenate([view.visible() for view in views], axis=1)
  slots, keys = visible.shape
  padded_slots = _padded(slots)
  padded_keys = _padded(keys + 1)
  table = np.zeros((padded_slots, padded_keys), bool)
  table[:slots, :keys] = visible
  table[:, keys:] = True
  return table

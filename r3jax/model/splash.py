"""Joint attention by JAX's block-sparse TPU kernel ("splash attention").

The kernel skips the blocks that the layout's static structure hides and never holds the scores;
which slots hold a token goes in as segment ids. `attention.attend` is the same function in XLA's
own operations: the two agree where a slot holds a token.
"""

from collections.abc import Sequence
import functools

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel as kernel_lib,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_mask as mask_lib,
)
import jax.numpy as jnp
import numpy as np

from r3jax import types
from r3jax.model import attention
from r3jax.parallel import sharding
from r3jax.sequence import segments

_LANES = 128  # the kernel's blocks are multiples of this
_BLOCK = 512
_FILLED, _EMPTY = 0, 1  # segment ids


def attend(
  query: types.Heads,
  sources: Sequence[attention.Source],
  rules: sharding.Rules,
  interpret: bool = False,
) -> types.Heads:
  """Attends to the union of the sources, as `attention.attend`; slots without a token get zeros.

  Args:
    query: [B, T, H, d]; d is a multiple of 128 on a TPU.
    sources: with masks that are `layout.Mask`s with a view; the last one holds the queries' own slots.
    rules: where rows and heads go; every device runs the kernel on its own.
    interpret: run the kernel in Python, for tests.

  Returns:
    [B, T, H, d] in the query's dtype.
  """
  rows, slots, _, width = query.shape
  key, value = (
    jnp.concatenate(
      [_every_row(getattr(s, name), rows) for s in sources], axis=1
    )
    for name in ("key", "value")
  )
  filled = jnp.concatenate([source.mask.filled for source in sources], axis=1)
  table = _table(tuple(source.mask.view for source in sources))
  padded_slots, padded_keys = table.shape
  query_ids = _segment_ids(sources[-1].mask.filled, padded_slots)
  key_ids = _segment_ids(filled, padded_keys)
  by_head = lambda x, size: jnp.pad(
    x.swapaxes(1, 2), ((0, 0), (0, 0), (0, size - x.shape[1]), (0, 0))
  )
  query = by_head(query * jnp.asarray(width**-0.5, query.dtype), padded_slots)
  key, value = by_head(key, padded_keys), by_head(value, padded_keys)
  heads_spec = rules.spec(query.shape, ("rows", "heads", None, None))
  kv_spec, ids_spec = (
    rules.spec(key.shape, ("rows", "kv_heads", None, None)),
    rules.spec(query_ids.shape, ("rows", None)),
  )
  run = sharding.by_hand(
    functools.partial(_run, table, interpret),
    (heads_spec, kv_spec, kv_spec, ids_spec, ids_spec),
    heads_spec,
  )
  return run(query, key, value, query_ids, key_ids)[:, :, :slots].swapaxes(1, 2)


def _run(
  table: np.ndarray, interpret: bool, query, key, value, query_ids, key_ids
):
  """Runs the kernel on [b, h, T, d] queries and [b, k, S, d] keys and values."""
  rows, heads, slots, width = query.shape
  query = query.reshape(rows, key.shape[1], -1, slots, width)
  block_q, block_kv = (min(_BLOCK, size) for size in table.shape)
  blocks = kernel_lib.BlockSizes(
    block_q=block_q,
    block_kv=block_kv,
    block_q_dkv=block_q,
    block_kv_dkv=block_kv,
    block_q_dq=block_q,
    block_kv_dq=block_kv,
  )
  mask = mask_lib.MultiHeadMask([mask_lib.NumpyMask(table)] * query.shape[2])
  kernel = kernel_lib.make_splash_mqa_single_device(
    mask, block_sizes=blocks, interpret=interpret
  )
  one_head = jax.vmap(kernel, in_axes=(0, 0, 0, None))
  ids = kernel_lib.SegmentIds(query_ids, key_ids)
  return jax.vmap(one_head)(query, key, value, ids).reshape(
    rows, heads, slots, width
  )


def _every_row(x: jax.Array, rows: int) -> jax.Array:
  return jnp.repeat(x, rows // x.shape[0], axis=0)


def _padded(size: int) -> int:
  block = min(_BLOCK, -(-size // _LANES) * _LANES)
  return -(-size // block) * block


def _segment_ids(filled: jax.Array, size: int) -> jax.Array:
  ids = jnp.where(filled, _FILLED, _EMPTY).astype(jnp.int32)
  return jnp.pad(
    ids, ((0, 0), (0, size - ids.shape[1])), constant_values=_EMPTY
  )


@functools.cache
def _table(views: tuple[segments.View, ...]) -> np.ndarray:
  """Returns who may see whom, filled up to whole blocks.

  Queries without a token see the empty keys at the end, so that every query sees something.
  """
  visible = np.concatenate([view.visible() for view in views], axis=1)
  slots, keys = visible.shape
  table = np.zeros((_padded(slots), _padded(keys + 1)), bool)
  table[:slots, :keys], table[:, keys:] = visible, True
  return table

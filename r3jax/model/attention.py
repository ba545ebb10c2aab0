"""Joint attention over several key/value sources without concatenating them, in XLA's operations.

`splash.py` has the same function as a TPU kernel.
"""

from collections.abc import Sequence
import dataclasses
import functools

import jax
import jax.numpy as jnp

from r3jax import types
from r3jax.sequence import segments

_BLOCK = 512  # query slots at a time where there are more than twice as many


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Source:
  """Keys and values that a query may attend to.

  A source may have fewer rows than the query: row g then serves the M = B / G consecutive query
  rows from g * M on, so that what a group shares is neither repeated nor copied.

  Attributes:
    key: keys after RoPE.
    value: values.
    mask: in halves for the TPU kernel; whole or in halves for `attend`.
  """

  key: types.KeyValue  # [G, S, K, d]
  value: types.KeyValue  # [G, S, K, d]
  mask: types.Mask | segments.Mask  # [B, T, S]


def attend(query: types.Heads, sources: Sequence[Source]) -> types.Heads:
  """Attends to the union of the sources: one softmax(q kᵀ / √d) v over all of them.

  Query head h uses key/value head h // (H / K). A slot that may see nothing gets the mean of the
  values; such slots are padding, which no result depends on. The scores of a long query exist for
  a block of its slots at a time, in the backward pass too.

  Scores, softmax and the sum over sources are in float32 or wider; the operands of products are in
  the dtype of the keys.

  Args:
    query: [B, T, H, d] in any dtype.
    sources: each with rows that divide B.

  Returns:
    [B, T, H, d] in the dtype of the values.
  """
  rows, slots, heads, width = query.shape
  query = query.astype(sources[0].key.dtype)
  masks = [_whole(source.mask) for source in sources]
  if slots <= 2 * _BLOCK:
    return _attend(query, sources, masks)

  num_blocks = -(-slots // _BLOCK)
  in_blocks = functools.partial(_in_blocks, num_blocks=num_blocks)

  # Recomputed in the backward pass, which would otherwise hold the scores of all blocks.
  @jax.checkpoint
  def attend_block(block):
    block_query, block_masks = block
    return _attend(block_query, sources, block_masks)

  blocks = (in_blocks(query), [in_blocks(mask) for mask in masks])
  mixed = jnp.moveaxis(jax.lax.map(attend_block, blocks), 0, 1)
  return mixed.reshape(rows, -1, heads, width)[:, :slots]


def _whole(mask: types.Mask | segments.Mask) -> jax.Array:
  return mask.dense() if isinstance(mask, segments.Mask) else mask


def _in_blocks(x: jax.Array, num_blocks: int) -> jax.Array:
  """Cuts [B, T, ...] into [blocks, B, _BLOCK, ...], filled up with zeros."""
  rows, slots, *rest = x.shape
  num_empty = num_blocks * _BLOCK - slots
  padding = [(0, 0), (0, num_empty), *[(0, 0)] * len(rest)]
  padded = jnp.pad(x, padding)
  return jnp.moveaxis(padded.reshape(rows, num_blocks, _BLOCK, *rest), 1, 0)


def _attend(
  query: jax.Array, sources: Sequence[Source], masks: Sequence[jax.Array]
) -> jax.Array:
  """Attends with scores for all slots at once, [B, T, H, d]."""
  scores = [
    _scores(query, source, mask)
    for source, mask in zip(sources, masks, strict=True)
  ]
  # Only the scores are concatenated; keys and values stay where they are.
  weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
  value_dtype = sources[0].value.dtype
  weights = weights.astype(value_dtype)
  mixed = 0
  start = 0
  for source in sources:
    stop = start + source.key.shape[1]
    mixed = mixed + _weighted_values(weights[..., start:stop], source)
    start = stop
  return jnp.reshape(mixed, query.shape).astype(value_dtype)


def _scores(query: jax.Array, source: Source, mask: jax.Array) -> jax.Array:
  """Returns masked scaled scores, [B, K, H/K, T, S], in float32 or wider."""
  rows, slots, heads, width = query.shape
  groups, _, kv_heads, _ = source.key.shape
  # [G, M, T, K, H/K, d]: shared rows and shared heads become axes of the query alone.
  folded = query.reshape(
    groups, rows // groups, slots, kv_heads, heads // kv_heads, width
  )
  # Sums in float32 whatever the inputs are: the softmax is sensitive to small differences.
  dtype = jnp.promote_types(query.dtype, jnp.float32)
  scores = jnp.einsum(
    "gmtkrd,gskd->gmkrts", folded, source.key, preferred_element_type=dtype
  )
  scale = width**-0.5
  scores = scores.reshape(-1, *scores.shape[2:]) * scale
  # Not -inf: a slot that sees nothing would become NaN, and its gradient too.
  hidden = jnp.finfo(dtype).min
  return jnp.where(mask[:, None, None], scores, hidden)


def _weighted_values(weights: jax.Array, source: Source) -> jax.Array:
  """Returns the weighted values of a source, [B, T, K, H/K, d] in float32 or wider."""
  groups = source.value.shape[0]
  folded = weights.reshape(groups, -1, *weights.shape[1:])
  # Not rounded source by source: `_attend` adds the sources up.
  dtype = jnp.promote_types(weights.dtype, jnp.float32)
  mixed = jnp.einsum(
    "gmkrts,gskd->gmtkrd", folded, source.value, preferred_element_type=dtype
  )
  return mixed.reshape(-1, *mixed.shape[2:])

"""Joint attention over several key/value sources without concatenating them, by XLA's own operations.

`splash.py` has the same function as a TPU kernel.
"""

from collections.abc import Sequence
import dataclasses
import functools

import jax
import jax.numpy as jnp

from r3jax import types
from r3jax.sequence import segments


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Source:
  """Keys and values that a query may attend to.

  A source may have fewer rows than the query: row i then serves the consecutive query rows
  i * B/b ... (i + 1) * B/b - 1, so what a group shares is neither repeated nor copied.
  """

  key: types.KeyValue  # [b, S, K, d]
  value: types.KeyValue  # [b, S, K, d]
  # [B, T, S]; whole for `attend`, in halves for the TPU kernel
  mask: types.Mask | segments.Mask


_BLOCK = 512  # query slots at a time where there are more than twice as many


def _folded(query: jax.Array, source: Source) -> jax.Array:
  """Returns the query as [b, B/b, T, K, H/K, d] for the rows and heads of the source."""
  rows, slots, heads, width = query.shape
  shared, _, kv_heads, _ = source.key.shape
  return query.reshape(
    shared, rows // shared, slots, kv_heads, heads // kv_heads, width
  )


def _scores(query: jax.Array, source: Source, mask: jax.Array) -> jax.Array:
  """Returns masked scaled scores, [B, K, H/K, T, S], in float32 or wider."""
  folded = _folded(query, source)
  wide = jnp.promote_types(query.dtype, jnp.float32)
  scores = jnp.einsum(
    "bftkrd,bskd->bfkrts", folded, source.key, preferred_element_type=wide
  )
  scores = scores.reshape(-1, *scores.shape[2:]) * query.shape[-1] ** -0.5
  return jnp.where(mask[:, None, None], scores, jnp.finfo(wide).min)


def _mix(weights: jax.Array, source: Source) -> jax.Array:
  """Returns the weighted values, [B, T, K, H/K, d]."""
  shared = source.value.shape[0]
  folded = weights.reshape(shared, -1, *weights.shape[1:])
  mixed = jnp.einsum("bfkrts,bskd->bftkrd", folded, source.value)
  return mixed.reshape(-1, *mixed.shape[2:])


def attend(query: types.Heads, sources: Sequence[Source]) -> types.Heads:
  """Attends to the union of the sources: one softmax(q k^T / sqrt(d)) over all of them.

  Query head h uses key/value head h // (H / K). A slot that may see nothing gets the mean of the
  values; such slots are padding and are read by nobody. The scores of a long query exist for a
  block of its slots at a time, in the backward pass too.

  Args:
    query: [B, T, H, d].
    sources: each with rows that divide B and a whole mask.

  Returns:
    [B, T, H, d] in the query's dtype.
  """
  slots = query.shape[1]
  if slots <= 2 * _BLOCK:
    return _attend(query, sources, [source.mask for source in sources])
  blocks = functools.partial(_in_blocks, number=-(-slots // _BLOCK))

  @jax.checkpoint
  def one(block):
    return _attend(block[0], sources, block[1])

  mixed = jax.lax.map(
    one, (blocks(query), [blocks(source.mask) for source in sources])
  )
  return jnp.moveaxis(mixed, 0, 1).reshape(
    query.shape[0], -1, *query.shape[2:]
  )[:, :slots]


def _in_blocks(x: jax.Array, number: int) -> jax.Array:
  """Cuts [B, T, ...] into [number, B, _BLOCK, ...], filled up with zeros."""
  padded = jnp.pad(
    x, ((0, 0), (0, number * _BLOCK - x.shape[1]), *[(0, 0)] * (x.ndim - 2))
  )
  return jnp.moveaxis(
    padded.reshape(x.shape[0], number, _BLOCK, *x.shape[2:]), 1, 0
  )


def _attend(
  query: jax.Array, sources: Sequence[Source], masks: Sequence[jax.Array]
) -> jax.Array:
  scores = [
    _scores(query, source, mask)
    for source, mask in zip(sources, masks, strict=True)
  ]
  weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(
    query.dtype
  )
  mixed, at = 0, 0
  for source in sources:
    width = source.key.shape[1]
    mixed = mixed + _mix(weights[..., at : at + width], source)
    at += width
  return mixed.reshape(query.shape)

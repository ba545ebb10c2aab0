"""Text decoding with a key/value cache (R3.md section 5)."""

from collections.abc import Mapping, Sequence
import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from r3jax import types
from r3jax.model import layers
from r3jax.model import network
from r3jax.parallel import collectives
from r3jax.sequence import segments

_TOP_P_CANDIDATES = 1000  # the reference looks at no more than this many


@dataclasses.dataclass(frozen=True)
class TextSampling:
  """How tokens are drawn.

  Attributes:
    temperature: 0 is greedy.
    top_p: below 1, keep the smallest set of best tokens whose probability exceeds it.
    top_k: above 0, keep that many best tokens; not together with top_p.
    axis: mapped mesh axis whose replicas decode equally long, so that collectives of the other mesh
      axes inside the loop meet; None where nothing is mapped.
  """

  temperature: float
  top_p: float = 1.0
  top_k: int = 0
  axis: str | None = None

  def __post_init__(self):
    if self.top_p < 1 and self.top_k > 0:
      raise ValueError(
        f"set top_p or top_k, not both; got top_p={self.top_p}, top_k={self.top_k}"
      )


def candidates(
  logits: jax.Array, sampling: TextSampling
) -> tuple[jax.Array, jax.Array]:
  """Returns the tokens that may be drawn and their probabilities, best first where filtered.

  top_p: of the min(1000, V) best tokens, one is kept if those better than it have a total
  probability, in the softmax over the *whole* vocabulary, of at most top_p.

  Args:
    logits: [B, V].
    sampling: temperature > 0 and the filter.

  Returns:
    ids [B, n] int32 and probabilities [B, n] that sum to 1 (up to rounding).
  """
  scaled = logits / sampling.temperature
  if sampling.top_p < 1:
    best, ids = jax.lax.top_k(scaled, min(_TOP_P_CANDIDATES, logits.shape[-1]))
    whole = jnp.exp(best - jax.nn.logsumexp(scaled, axis=-1, keepdims=True))
    better = jnp.cumsum(whole, axis=-1) - whole
    kept = jnp.where(better <= sampling.top_p, whole, 0.0)
    return ids, kept / kept.sum(axis=-1, keepdims=True)
  if sampling.top_k > 0:
    best, ids = jax.lax.top_k(scaled, min(sampling.top_k, logits.shape[-1]))
    return ids, jax.nn.softmax(best, axis=-1)
  ids = jnp.broadcast_to(
    jnp.arange(logits.shape[-1], dtype=jnp.int32), logits.shape
  )
  return ids, jax.nn.softmax(scaled, axis=-1)


def draw(
  logits: jax.Array, uniform: types.PerSample, sampling: TextSampling
) -> jax.Array:
  """Draws one token per row by inverting the cumulative distribution at `uniform`.

  Args:
    logits: [B, V].
    uniform: [B] in [0, 1).
    sampling: temperature and filter.

  Returns:
    [B] int32 token ids.
  """
  if sampling.temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  ids, probabilities = candidates(logits, sampling)
  cumulative = jnp.cumsum(probabilities, axis=-1)
  past = cumulative <= uniform[:, None] * cumulative[:, -1:]
  place = jnp.minimum(past.sum(axis=-1), ids.shape[-1] - 1)
  return jnp.take_along_axis(ids, place[:, None], axis=-1)[:, 0].astype(
    jnp.int32
  )


def logprob(logits: jax.Array, ids: jax.Array) -> jax.Array:
  """Returns log softmax(logits)[ids] over the last axis: temperature 1, no filter."""
  # Not a gather: the vocabulary may be split over devices.
  chosen = jnp.sum(
    jnp.where(jnp.arange(logits.shape[-1]) == ids[..., None], logits, 0),
    axis=-1,
    keepdims=True,
  )
  best = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
  rest = jnp.log(jnp.sum(jnp.exp(logits - best), axis=-1, keepdims=True))
  # in this order: small differences of large logits stay exact
  return (chosen - best - rest)[..., 0]


@flax.struct.dataclass
class Decoded:
  """A sampled text segment."""

  ids: jax.Array  # [B, T] begin, tokens, end, then padding
  lengths: jax.Array  # [B] begin and end included
  behavior_logprob: jax.Array  # [B, T - 1], entry j belongs to ids[:, j + 1]
  cache: network.Cache  # of the segment itself


@flax.struct.dataclass
class _Carry:
  step: jax.Array  # [] slot that is fed next
  decoded: Decoded
  ended: jax.Array  # [B] the end token has been fed
  going: jax.Array  # [] a row, of any replica, has not ended


def _begun(
  model: network.Bagel, name: str, shape: tuple[int, int], like: network.Cache
) -> _Carry:
  """Returns the carry before the first step: only the begin token is there.

  Args:
    model: gives the dtype and the begin token.
    name: the segment.
    shape: rows and capacity.
    like: any cache of the model, for the sizes of its entries.
  """
  rows, capacity = shape
  entries = jnp.zeros(
    (like.key.shape[0], rows, capacity, *like.key.shape[3:]), like.key.dtype
  )
  ids = (
    jnp.zeros(shape, jnp.int32)
    .at[:, 0]
    .set(model.config.special_ids.text_begin)
  )
  logprobs = jnp.zeros(
    (rows, capacity - 1), layers.at_least_float32(model.dtype)
  )
  cache = network.Cache(entries, entries, (name,))
  return _Carry(
    jnp.int32(0),
    Decoded(ids, jnp.full(rows, capacity), logprobs, cache),
    jnp.zeros(rows, bool),
    jnp.bool_(True),
  )


def _advanced(
  carry: _Carry,
  logits: jax.Array,
  cache: network.Cache,
  uniforms: jax.Array,
  sampling: TextSampling,
  end: int,
) -> _Carry:
  """Draws the token after the one that was fed; at the last slot but one it is the end token."""
  decoded, step = carry.decoded, carry.step
  last = decoded.ids.shape[1] - 2  # the last step that draws
  place = jnp.minimum(step, last)
  drawn = draw(logits, uniforms[:, place], sampling)
  ended = carry.ended | ((decoded.ids[:, step] == end) & (step > 0))
  live = ~ended & (step <= last)
  going = jnp.any(~ended)
  if sampling.axis:
    going = collectives.largest(going.astype(jnp.int32), sampling.axis) > 0
  write = lambda array, new, at: array.at[:, at].set(
    jnp.where(live, new, array[:, at])
  )
  return _Carry(
    step=step + 1,
    decoded=Decoded(
      ids=write(decoded.ids, jnp.where(step == last, end, drawn), place + 1),
      lengths=jnp.where(ended & ~carry.ended, step + 1, decoded.lengths),
      behavior_logprob=write(
        decoded.behavior_logprob, logprob(logits, drawn), place
      ),
      cache=cache,
    ),
    ended=ended,
    going=going,
  )


def decode(
  model: network.Bagel,
  policy: types.Params,
  layout: segments.Layout,
  name: str,
  past: Sequence[network.Cache],
  lengths: Mapping[str, types.Lengths],
  uniforms: jax.Array,
  sampling: TextSampling,
) -> Decoded:
  """Samples the text segment `name` after the cached context, until every row has ended.

  Starts by feeding the begin token; a row stops when its end token has been fed; the last slot is
  forced to be the end token (the log-prob recorded there belongs to the token it replaced).

  Args:
    model: the policy's module.
    policy: its parameters.
    layout: the sequence; segment `name` has capacity T = max_tokens + 1.
    name: the text segment to sample.
    past: caches of what the segment sees.
    lengths: [B] tokens of the text segments it sees.
    uniforms: [B, T - 1] in [0, 1), one per drawn token.
    sampling: how to draw.

  Returns:
    Ids, lengths, behaviour log-probs and the segment's cache.
  """
  capacity, end = layout[name].capacity, model.config.special_ids.text_end

  def unfinished(carry: _Carry) -> jax.Array:
    return carry.going & (carry.step < capacity)

  def advance(carry: _Carry) -> _Carry:
    fed = carry.decoded.ids[:, carry.step]
    logits, cache = model.apply(
      {"params": policy},
      layout,
      fed,
      carry.step,
      lengths,
      past,
      carry.decoded.cache,
      method="step",
    )
    return _advanced(carry, logits, cache, uniforms, sampling, end)

  first = _begun(model, name, (uniforms.shape[0], capacity), past[0])
  return jax.lax.while_loop(unfinished, advance, first).decoded

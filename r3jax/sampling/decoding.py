"""Text decoding with a key/value cache (docs/algorithm.md#sampling-text)."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import cast

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
  vocab_size = logits.shape[-1]
  scaled = logits / sampling.temperature
  if sampling.top_p < 1:
    top, ids = jax.lax.top_k(scaled, min(_TOP_P_CANDIDATES, vocab_size))
    log_sum = jax.nn.logsumexp(scaled, axis=-1, keepdims=True)
    probabilities = jnp.exp(top - log_sum)
    better = jnp.cumsum(probabilities, axis=-1) - probabilities
    nucleus = jnp.where(better <= sampling.top_p, probabilities, 0.0)
    return ids, nucleus / nucleus.sum(axis=-1, keepdims=True)
  if sampling.top_k > 0:
    top, ids = jax.lax.top_k(scaled, min(sampling.top_k, vocab_size))
    return ids, jax.nn.softmax(top, axis=-1)
  ids = jnp.arange(vocab_size, dtype=jnp.int32)
  return jnp.broadcast_to(ids, logits.shape), jax.nn.softmax(scaled, axis=-1)


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
  # The last entry is 1 up to rounding; the draw is relative to it.
  threshold = uniform[:, None] * cumulative[:, -1:]
  num_below = (cumulative <= threshold).sum(axis=-1)
  index = jnp.minimum(num_below, ids.shape[-1] - 1)
  token = jnp.take_along_axis(ids, index[:, None], axis=-1)
  return token[:, 0].astype(jnp.int32)


def logprob(logits: jax.Array, ids: jax.Array) -> jax.Array:
  """Returns log softmax(logits)[ids] over the last axis: temperature 1, no filter.

  Args:
    logits: [..., V] in float32 or wider.
    ids: [...] int32.

  Returns:
    [...], not above 0.
  """
  # A masked sum instead of a gather: the vocabulary may be split over devices.
  vocabulary = jnp.arange(logits.shape[-1])
  is_chosen = vocabulary == ids[..., None]
  chosen = jnp.where(is_chosen, logits, 0).sum(axis=-1, keepdims=True)
  largest = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
  exp_sum = jnp.exp(logits - largest).sum(axis=-1, keepdims=True)
  log_sum = jnp.log(exp_sum)
  # In this order: small differences of large logits stay exact.
  logprobs = chosen - largest - log_sum
  return logprobs[..., 0]


@flax.struct.dataclass
class Decoded:
  """A sampled text segment.

  Attributes:
    ids: begin, tokens, end, then padding.
    lengths: slots in use, begin and end included.
    behavior_logprob: log-prob of every drawn token; entry j belongs to ids[:, j + 1].
    cache: keys and values of the segment itself.
  """

  ids: jax.Array  # [B, T] int32
  lengths: jax.Array  # [B] int32
  behavior_logprob: jax.Array  # [B, T - 1]
  cache: network.Cache


@flax.struct.dataclass
class _State:
  """State of the decoding loop.

  Attributes:
    step: slot that is fed next.
    decoded: what has been drawn so far.
    ended: the end token has been fed.
    is_running: a row, of any replica, has not ended.
  """

  step: jax.Array  # [] int32
  decoded: Decoded
  ended: jax.Array  # [B] bool
  is_running: jax.Array  # [] bool


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
    Ids, lengths, behavior log-probs and the segment's cache.
  """
  capacity = layout[name].capacity
  text_end = model.config.special_ids.text_end
  # In a narrow type the compiler would round elsewhere than in the pass that scores the tokens.
  is_wide = model.dtype == layers.at_least_float32(model.dtype)
  if model.attention == "by_head" and is_wide:
    model, policy, past = network.separate(model, policy, past)

  def is_unfinished(state: _State) -> jax.Array:
    return state.is_running & (state.step < capacity)

  def advance(state: _State) -> _State:
    fed = state.decoded.ids[:, state.step]
    output = model.apply(
      {"params": policy},
      layout,
      fed,
      state.step,
      lengths,
      past,
      state.decoded.cache,
      method="step",
    )
    logits, cache = cast(tuple[jax.Array, network.Cache], output)
    return _with_next_token(state, logits, cache, uniforms, sampling, text_end)

  rows = uniforms.shape[0]
  initial = _initial_state(model, name, (rows, capacity), like=past[0])
  decoded = jax.lax.while_loop(is_unfinished, advance, initial).decoded
  return dataclasses.replace(decoded, cache=network.stacked(decoded.cache))


def _initial_state(
  model: network.Bagel, name: str, shape: tuple[int, int], like: network.Cache
) -> _State:
  """Returns the state before the first step: only the begin token is written.

  Args:
    model: gives the dtype and the begin token.
    name: the segment.
    shape: rows and capacity.
    like: any cache of the model, for the sizes of its entries.
  """
  rows, capacity = shape

  def empty(entries: jax.Array) -> jax.Array:
    *layers, _, _, heads, width = entries.shape
    return jnp.zeros((*layers, rows, capacity, heads, width), entries.dtype)

  entries = jax.tree.map(empty, like.key)
  text_begin = model.config.special_ids.text_begin
  decoded = Decoded(
    ids=jnp.zeros(shape, jnp.int32).at[:, 0].set(text_begin),
    lengths=jnp.full(rows, capacity),
    behavior_logprob=jnp.zeros(
      (rows, capacity - 1), layers.at_least_float32(model.dtype)
    ),
    cache=network.Cache(entries, entries, (name,)),
  )
  return _State(
    step=jnp.int32(0),
    decoded=decoded,
    ended=jnp.zeros(rows, bool),
    is_running=jnp.bool_(True),
  )


def _with_next_token(
  state: _State,
  logits: jax.Array,
  cache: network.Cache,
  uniforms: jax.Array,
  sampling: TextSampling,
  text_end: int,
) -> _State:
  """Draws the token after the one that was fed; in the last slot it is the end token."""
  decoded = state.decoded
  step = state.step
  last_draw = decoded.ids.shape[1] - 2
  # The step after the last draw feeds the end token and draws nothing.
  index = jnp.minimum(step, last_draw)
  token = draw(logits, uniforms[:, index], sampling)
  token_logprob = logprob(logits, token)

  fed_end = decoded.ids[:, step] == text_end
  ended = state.ended | (fed_end & (step > 0))
  is_running = jnp.any(~ended)
  if sampling.axis:
    running_rows = is_running.astype(jnp.int32)
    is_running = collectives.pmax(running_rows, sampling.axis) > 0

  writes = ~ended & (step <= last_draw)

  def write(array: jax.Array, value: jax.Array, slot: jax.Array) -> jax.Array:
    column = jnp.where(writes, value, array[:, slot])
    return array.at[:, slot].set(column)

  next_token = jnp.where(step == last_draw, text_end, token)
  ends_here = ended & ~state.ended
  return _State(
    step=step + 1,
    decoded=Decoded(
      ids=write(decoded.ids, next_token, index + 1),
      lengths=jnp.where(ends_here, step + 1, decoded.lengths),
      behavior_logprob=write(decoded.behavior_logprob, token_logprob, index),
      cache=cache,
    ),
    ended=ended,
    is_running=is_running,
  )

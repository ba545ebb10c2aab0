"""BAGEL's language model with its image adapters: embed segments, transform, read out.

`Bagel` holds the parameters that are trained (the *policy*); the ViT and the autoencoder are
frozen, see `siglip.py`, `autoencoder.py` and `image_encoders.py`.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from r3jax import types
from r3jax.model import architecture
from r3jax.model import layers
from r3jax.model import low_rank
from r3jax.model import mot
from r3jax.parallel import sharding
from r3jax.sequence import segments


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Noised:
  """Input of a latent segment.

  Attributes:
    latent: tokens of the noisy (or clean) latent.
    t: time of the flow in [0, 1]; 0 is clean, 1 is noise.
  """

  latent: types.Latent  # [B, N, C]
  t: types.Time  # [B]


# Input of a segment: ids [B, capacity] (text), ViT features [B, N, vision hidden size] or Noised.
SegmentInput = jax.Array | Noised


@flax.struct.dataclass
class Cache:
  """Keys and values of some segments, for later queries.

  Attributes:
    key: keys after RoPE; a stack, or one array per layer where `Bagel.is_separate`.
    value: values, as the keys.
    names: the segments, in slot order.
  """

  key: mot.Entries  # [L, G, S, K, d]
  value: mot.Entries  # [L, G, S, K, d]
  names: tuple[str, ...] = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Output:
  """Result of one forward pass over some segments.

  Attributes:
    hidden: hidden states after the final norm.
    cache: keys and values of the segments.
    slots: where the segments' slots are in the hidden states.
  """

  hidden: mot.Streams  # [B, T_und, D], [B, T_gen, D]
  cache: Cache  # [L, B, T, K, d]
  slots: segments.Slots = flax.struct.field(pytree_node=False)

  def text(self, name: str) -> types.Hidden:
    """Returns the hidden states of a text or ViT segment, markers included, [B, T, D]."""
    und_range, _ = self.slots.ranges[name]
    return self.hidden.und[:, und_range]

  def latent(self, name: str) -> types.Hidden:
    """Returns the hidden states of the latents of a VAE image, markers left out, [B, N, D]."""
    _, gen_range = self.slots.ranges[name]
    return self.hidden.gen[:, gen_range]


class Embedding(nn.Module):
  """Token embeddings.

  The table is sharded along its width only: XLA's partitioner aborts the process on a gather from a
  table that is sharded on both dimensions inside a partly mapped region.

  Attributes:
    size: rows of the table.
    width: D.
    dtype: compute dtype.
    rules: where the table and the embeddings go.
  """

  size: int
  width: int
  dtype: types.DType
  rules: sharding.Rules

  @nn.compact
  def __call__(self, ids: types.TokenIds) -> types.Hidden:
    """Returns the embeddings of ids [B, T], [B, T, D]."""
    init = nn.with_logical_partitioning(
      nn.initializers.normal(0.02), (None, "table")
    )
    parameter = self.param("embedding", init, (self.size, self.width))
    # Rows are rounded and not the table, whose gradient adds up all occurrences of an id.
    rows = jnp.asarray(parameter)[ids].astype(self.dtype)
    embeddings = self.rules.constrain(rows, "rows", None, "table")
    return self.rules.constrain(embeddings, "rows", None, None)


class TwoLayers(nn.Module):
  """Linear, activation, linear: the connector and the timestep MLP.

  Attributes:
    hidden: width of both layers' output.
    activation: "gelu_tanh" or "silu".
    dtype: compute dtype.
  """

  hidden: int
  activation: str
  dtype: types.DType

  def setup(self):
    """Makes the submodules."""
    projection = functools.partial(
      layers.Projection,
      (self.hidden,),
      ("adapter", "embed"),
      use_bias=True,
      dtype=self.dtype,
    )
    self.fc1 = projection()
    self.fc2 = projection()

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns [..., hidden] of [..., inputs]."""
    activate = nn.silu if self.activation == "silu" else nn.gelu
    return self.fc2(activate(self.fc1(x)))


class Bagel(nn.Module):
  """Everything of BAGEL that R3 trains.

  Attributes:
    config: sizes.
    dtype: compute dtype; parameters are float32.
    remat: recomputation of the layers in the backward pass, see `mot.scanned_layers`.
    attention: implementation, "xla", "by_head" (loops of plain products, for CPUs) or "splash"
      (JAX's block-sparse TPU kernel).
    rules: where parameters and activations go.
    lora: which projections have adapters; applied where the parameters hold them.
    is_separate: every layer has parameters and caches of its own, see `separate`.
  """

  config: architecture.BagelConfig
  dtype: types.DType = jnp.float32
  remat: str = "none"
  attention: str = "xla"
  rules: sharding.Rules = sharding.TRAIN
  lora: low_rank.LoRA = low_rank.LoRA()
  is_separate: bool = False

  def setup(self):
    """Makes the submodules."""
    llm = self.config.llm
    projection = functools.partial(layers.Projection, dtype=self.dtype)
    self.embed_tokens = Embedding(
      llm.vocab_size, llm.hidden_size, self.dtype, self.rules
    )
    if self.is_separate:
      self.layers = mot.SeparateLayers(
        llm, self.dtype, self.rules, self.lora, self.attention
      )
    else:
      self.layers = mot.scanned_layers(
        llm, self.dtype, self.remat, self.rules, self.lora, self.attention
      )
    self.norm = mot.FinalNorm(llm, self.dtype)
    # A log-prob follows the logits, a ratio the velocities: bfloat16 would round logits of size 16
    # to steps of 1/8.
    self.lm_head = projection(
      (llm.vocab_size,), ("embed", "vocab"), is_wide=True
    )
    self.connector = TwoLayers(llm.hidden_size, "gelu_tanh", self.dtype)
    self.time_embedder = TwoLayers(llm.hidden_size, "silu", self.dtype)
    self.vae2llm = projection(
      (llm.hidden_size,), ("adapter", "embed"), use_bias=True
    )
    self.llm2vae = projection(
      (self.config.latent_dim,),
      ("embed", "adapter"),
      use_bias=True,
      is_wide=True,
    )

  def __call__(
    self,
    layout: segments.Layout,
    inputs: Mapping[str, SegmentInput],
    lengths: Mapping[str, types.Lengths],
    past: Sequence[Cache] = (),
  ) -> Output:
    """Runs the given segments, attending to themselves and to the cached ones.

    Args:
      layout: the whole sequence.
      inputs: input of each segment to run, in layout order.
      lengths: [B] tokens of every text segment that is run, cached or seen.
      past: caches of earlier segments; their rows divide B.

    Returns:
      Final hidden states and the cache of the segments that ran.
    """
    names = tuple(inputs)
    x = self.embed(layout, inputs)
    rows = x.und.shape[0]
    sources = [*(cache.names for cache in past), names]
    masks = tuple(
      segments.mask(layout, names, source, lengths, rows) for source in sources
    )
    # The others read the static half of a mask by itself, and skip what it hides.
    if self.attention == "xla":
      masks = tuple(mask.dense() for mask in masks)
    positions = segments.positions(layout, names, lengths, rows)
    hidden, (key, value) = self.transform(x, positions, masks, past)
    cache = Cache(key, value, names)
    return Output(hidden, cache, layout.slots(names))

  def transform(
    self,
    x: mot.Streams,
    positions: types.Positions,
    masks: tuple[types.Mask | segments.Mask, ...],
    past: Sequence[Cache],
  ) -> tuple[mot.Streams, tuple[jax.Array, jax.Array]]:
    """Runs all layers and the final norm.

    Args:
      x: embeddings by expert.
      positions: [B, T] rotary positions.
      masks: one per past cache, then that of the slots themselves.
      past: caches of earlier segments.

    Returns:
      Hidden states, and the keys and values [L, B, T, K, d].
    """
    past_entries = tuple((cache.key, cache.value) for cache in past)
    x, (key, value) = self.layers(x, positions, masks, past_entries)
    return self.norm(x), (key, value)

  def step(
    self,
    layout: segments.Layout,
    ids: jax.Array,
    place: jax.Array,
    lengths: Mapping[str, types.Lengths],
    past: Sequence[Cache],
    own: Cache,
  ) -> tuple[jax.Array, Cache]:
    """Feeds one token of a text segment that is being decoded.

    Args:
      layout: the whole sequence.
      ids: [B] the tokens to feed.
      place: [] their slot in the segment.
      lengths: [B] tokens of the text segments that the segment sees.
      past: caches of those segments.
      own: the segment's cache, filled before `place`.

    Returns:
      Next-token logits [B, V] and the segment's cache with `place` filled.
    """
    rows = ids.shape[0]
    (name,) = own.names
    # The past is seen as from the segment's first slot; its own slots up to the one fed now.
    masks: list[types.Mask] = []
    for cache in past:
      mask = segments.mask(layout, own.names, cache.names, lengths, rows)
      masks.append(mask.dense()[:, :1])
    is_before = jnp.arange(layout[name].capacity) < place
    masks.append(jnp.broadcast_to(is_before, (rows, 1, is_before.size)))
    masks.append(jnp.ones((rows, 1, 1), bool))

    start = jnp.reshape(segments.start(layout, name, lengths), (-1, 1))
    position = jnp.zeros((rows, 1), jnp.int32) + place + start
    und = self.embed_tokens(ids[:, None])
    x = mot.Streams(und=und, gen=und[:, :0])
    hidden, (key, value) = self.transform(
      x, position, tuple(masks), (*past, own)
    )

    # XLA writes in place inside a decoding loop, which owns the cache.
    def write(cached: jax.Array, entry: jax.Array) -> jax.Array:
      slots_axis = cached.ndim - 3
      return jax.lax.dynamic_update_slice_in_dim(
        cached, entry, place, slots_axis
      )

    logits = self.logits(hidden.und)[:, 0]
    logits = self.rules.constrain(logits, "rows", None)
    cache = Cache(
      key=jax.tree.map(write, own.key, key),
      value=jax.tree.map(write, own.value, value),
      names=own.names,
    )
    return logits, cache

  def embed(
    self, layout: segments.Layout, inputs: Mapping[str, SegmentInput]
  ) -> mot.Streams:
    """Returns the input embeddings of the given segments by expert."""
    und = []
    gen = []
    for name, value in inputs.items():
      segment_und, segment_gen = self._embed_segment(layout[name], value)
      und.append(segment_und)
      gen.append(segment_gen)
    return mot.Streams(
      und=jnp.concatenate(und, axis=1), gen=jnp.concatenate(gen, axis=1)
    )

  def _embed_segment(
    self, segment: segments.Segment, value: SegmentInput
  ) -> tuple[jax.Array, jax.Array]:
    """Returns the embeddings of the segment's und slots and of its gen slots."""
    if isinstance(value, Noised):
      assert segment.grid is not None  # it is None for text only
      # The markers of a VAE image belong to the und expert, its latents to gen.
      begin, end = self._markers(value.latent.shape[0])
      markers = jnp.concatenate([begin, end], axis=1)
      return markers, self.embed_latent(value, segment.grid)
    if segment.grid is None:
      und = self.embed_tokens(value)
      return und, und[:, :0]
    begin, end = self._markers(value.shape[0])
    patches = self.embed_vision(value, segment.grid)
    und = jnp.concatenate([begin, patches, end], axis=1)
    return und, und[:, :0]

  def _markers(self, rows: int) -> tuple[jax.Array, jax.Array]:
    """Returns the embeddings of the begin and the end marker of an image, [B, 1, D] each."""
    shape = (rows, 1, self.config.llm.hidden_size)
    wide = layers.at_least_float32(self.dtype)

    def marker(token_id: int) -> jax.Array:
      embedding = self.embed_tokens(jnp.array([[token_id]])).astype(wide)
      # Repeated in float32: the gradient is a sum over all rows.
      return jnp.broadcast_to(embedding, shape).astype(self.dtype)

    special_ids = self.config.special_ids
    return marker(special_ids.image_begin), marker(special_ids.image_end)

  def embed_vision(
    self, features: jax.Array, grid: tuple[int, int]
  ) -> types.Hidden:
    """Returns the connected ViT features with their sin-cos position, [B, N, D]."""
    positions = _position_rows(
      self.config.llm.hidden_size, self.config.max_patches_per_side, grid
    )
    return self.connector(features) + positions.astype(self.dtype)

  def embed_latent(self, noised: Noised, grid: tuple[int, int]) -> types.Hidden:
    """Returns vae2llm(latent) + time embedding + sin-cos position, [B, N, D]."""
    positions = _position_rows(
      self.config.llm.hidden_size, self.config.max_latent_side, grid
    )
    # Added in float32: the gradient of the time is a sum over all tokens of an image.
    wide = layers.at_least_float32(self.dtype)
    tokens = self.vae2llm(noised.latent).astype(wide)
    time = self.embed_time(noised.t)[:, None].astype(wide)
    return (tokens + time + positions.astype(wide)).astype(self.dtype)

  def embed_time(self, t: types.Time) -> jax.Array:
    """Returns the embedding of flow times in [0, 1], [B, D]."""
    return self.time_embedder(layers.timestep_features(t))

  def logits(self, hidden: types.Hidden) -> types.Logits:
    """Returns next-token logits, [B, T, V] in float32 or wider."""
    # Logits are split over the vocabulary; the rows leave its mesh axes free.
    constrain = self.rules.constrain
    hidden = constrain(hidden, "rows", None, None, without="vocab")
    return constrain(self.lm_head(hidden), "rows", None, "vocab")

  def velocity(self, hidden: types.Hidden) -> types.Latent:
    """Returns the flow velocity (noise minus data), [B, N, C] in float32 or wider."""
    return self.llm2vae(hidden)

  def everything(
    self,
    layout: segments.Layout,
    inputs: Mapping[str, SegmentInput],
    lengths: Mapping[str, types.Lengths],
  ) -> tuple[types.Logits, types.Latent]:
    """Returns logits and velocities; reads every parameter, and so is the method for `init`."""
    output = self(layout, inputs, lengths)
    return self.logits(output.hidden.und), self.velocity(output.hidden.gen)


def separate(
  model: Bagel, policy: types.Params, caches: Sequence[Cache]
) -> tuple[Bagel, types.Params, list[Cache]]:
  """Takes layers out of their stacks, for a loop that runs all of them many times.

  Args:
    model: with stacked layers.
    policy: its parameters.
    caches: keys and values of some segments, stacked.

  Returns:
    The module, its parameters and the caches, one tree or array per layer.
  """
  num_layers = model.config.llm.num_layers

  def layer(stack: Any, i: int) -> Any:
    return jax.tree.map(lambda x: x[i], stack)

  layers_of_policy = {
    mot.layer_name(i): layer(policy["layers"], i) for i in range(num_layers)
  }
  separate_caches = []
  for cache in caches:
    entries = [layer((cache.key, cache.value), i) for i in range(num_layers)]
    keys, values = zip(*entries, strict=True)
    separate_caches.append(Cache(keys, values, cache.names))
  separate_policy = {**policy, "layers": layers_of_policy}
  return model.clone(is_separate=True), separate_policy, separate_caches


def stacked(cache: Cache) -> Cache:
  """Returns a cache as stacks, [L, G, S, K, d]."""
  if isinstance(cache.key, tuple):
    return Cache(jnp.stack(cache.key), jnp.stack(cache.value), cache.names)
  return cache


def _position_rows(width: int, side: int, grid: tuple[int, int]) -> jax.Array:
  """Returns the sin-cos positions of an image of `grid` tokens, [N, width]."""
  # A constant of the program, made on the host.
  table = layers.sincos_table(width, side)
  entries = layers.grid_positions(*grid, side)
  return jnp.asarray(table[entries])

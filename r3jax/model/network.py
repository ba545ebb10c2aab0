"""BAGEL's language model with its image adapters: embed segments, transform, read out.

`Bagel` holds the parameters that are trained (the *policy*); the ViT and the autoencoder are
frozen and live in `siglip.py` and `autoencoder.py`.
"""

from collections.abc import Mapping, Sequence
import dataclasses

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
  """Input of a latent segment."""

  latent: types.Latent  # [B, N, C]
  t: types.Time  # [B] in [0, 1], 0 = clean


@flax.struct.dataclass
class Cache:
  """Keys (after RoPE) and values of some segments, for later queries."""

  key: jax.Array  # [L, b, S, K, d]
  value: jax.Array  # [L, b, S, K, d]
  # segments, in slot order
  names: tuple[str, ...] = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Output:
  """What one forward pass over some segments returns."""

  hidden: mot.Streams  # after the final norm
  cache: Cache
  slots: segments.Slots = flax.struct.field(pytree_node=False)

  def text(self, name: str) -> types.Hidden:
    """Returns the hidden states of a text or ViT segment, markers included, [B, T, D]."""
    return self.hidden.und[:, self.slots.ranges[name][0]]

  def latent(self, name: str) -> types.Hidden:
    """Returns the hidden states of the latents of a VAE image, markers left out, [B, N, D]."""
    return self.hidden.gen[:, self.slots.ranges[name][1]]


class Embedding(nn.Module):
  """Token embeddings.

  The table is sharded along its width only: XLA's partitioner aborts the process on a gather from a
  table that is sharded on both dimensions inside a partly mapped region.
  """

  size: int
  width: int
  dtype: types.DType
  rules: sharding.Rules

  @nn.compact
  def __call__(self, ids: types.TokenIds) -> types.Hidden:
    init = nn.with_logical_partitioning(
      nn.initializers.normal(0.02), (None, "table")
    )
    table = self.param("embedding", init, (self.size, self.width)).astype(
      self.dtype
    )
    found = self.rules.constrain(table[ids], "rows", None, "table")
    return self.rules.constrain(found, "rows", None, None)


class TwoLayers(nn.Module):
  """Linear, activation, linear: the connector and the timestep MLP."""

  hidden: int
  activation: str  # "gelu_tanh" or "silu"
  dtype: types.DType

  def setup(self):
    project = dict(features=(self.hidden,), use_bias=True, dtype=self.dtype)
    self.fc1 = layers.Projection(axes=("adapter", "embed"), **project)
    self.fc2 = layers.Projection(axes=("adapter", "embed"), **project)

  def __call__(self, x: jax.Array) -> jax.Array:
    activate = nn.silu if self.activation == "silu" else nn.gelu
    return self.fc2(activate(self.fc1(x)))


class Bagel(nn.Module):
  """Everything of BAGEL that R3 trains.

  Attributes:
    config: sizes.
    dtype: compute dtype; parameters are float32.
    remat: recomputation of the layers in the backward pass, see `mot.scanned_layers`.
    attention: what attends, "xla" or "splash" (JAX's block-sparse TPU kernel).
    rules: where parameters and activations go.
    lora: which projections have adapters; they count where the parameters hold them.
  """

  config: architecture.BagelConfig
  dtype: types.DType = jnp.float32
  remat: str = "none"
  attention: str = "xla"
  rules: sharding.Rules = sharding.TRAIN
  lora: low_rank.LoRA = low_rank.LoRA()

  def setup(self):
    llm = self.config.llm
    self.embed_tokens = Embedding(
      llm.vocab_size, llm.hidden_size, self.dtype, self.rules
    )
    self.layers = mot.scanned_layers(
      llm, self.dtype, self.remat, self.rules, self.lora
    )
    self.norm = mot.FinalNorm(llm, self.dtype)
    self.lm_head = layers.Projection(
      (llm.vocab_size,), ("embed", "vocab"), dtype=self.dtype
    )
    self.connector = TwoLayers(llm.hidden_size, "gelu_tanh", self.dtype)
    self.time_embedder = TwoLayers(llm.hidden_size, "silu", self.dtype)
    self.vae2llm = layers.Projection(
      (llm.hidden_size,), ("adapter", "embed"), use_bias=True, dtype=self.dtype
    )
    self.llm2vae = layers.Projection(
      (self.config.latent_dim,),
      ("embed", "adapter"),
      use_bias=True,
      dtype=self.dtype,
    )

  def __call__(
    self,
    layout: segments.Layout,
    inputs: Mapping[str, jax.Array | Noised],
    lengths: Mapping[str, types.Lengths],
    past: Sequence[Cache] = (),
  ) -> Output:
    """Runs the given segments, attending to themselves and to the cached ones.

    Args:
      layout: the whole sequence.
      inputs: for each segment to run, in layout order: ids [B, capacity] (text), ViT features
        [B, N, vision hidden] (vit) or `Noised` (clean, noise).
      lengths: [B] tokens of every text segment that is run, cached or seen.
      past: caches of earlier segments; their rows divide B.

    Returns:
      Final hidden states and the cache of the segments that ran.
    """
    names = tuple(inputs)
    x = self.embed(layout, inputs)
    rows = x.und.shape[0]
    masks = tuple(
      segments.mask(layout, names, keys, lengths, rows)
      for keys in [*(c.names for c in past), names]
    )
    if self.attention == "xla":
      masks = tuple(mask.dense() for mask in masks)
    positions = segments.positions(layout, names, lengths, rows)
    hidden, (key, value) = self.transform(x, positions, masks, past)
    return Output(hidden, Cache(key, value, names), layout.slots(names))

  def transform(
    self,
    x: mot.Streams,
    positions: types.Positions,
    masks,
    past: Sequence[Cache],
  ):
    """Runs all layers and the final norm; returns hidden states, keys and values [L, B, T, K, d]."""
    x, (key, value) = self.layers(
      x, positions, masks, tuple((c.key, c.value) for c in past)
    )
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
    rows, (name,) = ids.shape[0], own.names
    before = jnp.arange(own.key.shape[2]) < place
    masks = tuple(
      segments.mask(layout, own.names, cache.names, lengths, rows).dense()[
        :, :1
      ]
      for cache in past
    )
    masks += (
      jnp.broadcast_to(before, (rows, 1, before.size)),
      jnp.ones((rows, 1, 1), bool),
    )
    position = (
      jnp.zeros((rows, 1), jnp.int32)
      + place
      + jnp.reshape(segments.start(layout, name, lengths), (-1, 1))
    )
    und = self.embed_tokens(ids[:, None])
    hidden, (key, value) = self.transform(
      mot.Streams(und, und[:, :0]), position, masks, (*past, own)
    )
    write = lambda filled, new: jax.lax.dynamic_update_slice_in_dim(
      filled, new, place, axis=2
    )
    logits = self.rules.constrain(self.logits(hidden.und)[:, 0], "rows", None)
    return logits, own.replace(
      key=write(own.key, key), value=write(own.value, value)
    )

  def residual(
    self, x: mot.Streams, positions: types.Positions, masks
  ) -> mot.Streams:
    """Returns the residual streams before the final norm (to look inside)."""
    return self.layers(x, positions, masks, ())[0]

  def embed(
    self, layout: segments.Layout, inputs: Mapping[str, jax.Array | Noised]
  ) -> mot.Streams:
    """Returns the input embeddings of the given segments by expert."""
    parts = [
      self._embed_segment(layout[name], value) for name, value in inputs.items()
    ]
    return mot.Streams(
      jnp.concatenate([und for und, _ in parts], axis=1),
      jnp.concatenate([gen for _, gen in parts], axis=1),
    )

  def _embed_segment(
    self, segment: segments.Segment, value
  ) -> tuple[jax.Array, jax.Array]:
    if segment.kind == "text":
      und = self.embed_tokens(value)
      return und, und[:, :0]
    if segment.kind == "vit":
      begin, end = self._markers(value.shape[0])
      und = jnp.concatenate(
        [begin, self.embed_vision(value, segment.grid), end], axis=1
      )
      return und, und[:, :0]
    begin, end = self._markers(value.latent.shape[0])
    return jnp.concatenate([begin, end], axis=1), self.embed_latent(
      value, segment.grid
    )

  def _markers(self, rows: int) -> tuple[jax.Array, jax.Array]:
    ids = self.config.special_ids
    marker = lambda i: jnp.broadcast_to(
      self.embed_tokens(jnp.array([[i]])),
      (rows, 1, self.config.llm.hidden_size),
    )
    return marker(ids.image_begin), marker(ids.image_end)

  def embed_vision(
    self, features: jax.Array, grid: tuple[int, int]
  ) -> types.Hidden:
    """Returns the connected ViT features with their sin-cos position, [B, N, D]."""
    table = _position_rows(
      self.config.llm.hidden_size, self.config.max_patches_per_side, grid
    )
    return self.connector(features) + table.astype(self.dtype)

  def embed_latent(self, noised: Noised, grid: tuple[int, int]) -> types.Hidden:
    """Returns vae2llm(latent) + time embedding + sin-cos position, [B, N, D]."""
    table = _position_rows(
      self.config.llm.hidden_size, self.config.max_latent_side, grid
    )
    return (
      self.vae2llm(noised.latent)
      + self.embed_time(noised.t)[:, None]
      + table.astype(self.dtype)
    )

  def embed_time(self, t: types.Time) -> jax.Array:
    """Returns the embedding of flow times in [0, 1], [B, D]."""
    return self.time_embedder(layers.timestep_features(t))

  def logits(self, hidden: types.Hidden) -> types.Logits:
    """Returns next-token logits in float32 or wider."""
    found = self.lm_head(
      self.rules.constrain(hidden, "rows", None, None, without="vocab")
    )
    return self.rules.constrain(found, "rows", None, "vocab").astype(
      layers.at_least_float32(self.dtype)
    )

  def velocity(self, hidden: types.Hidden) -> types.Latent:
    """Returns the flow velocity (noise minus data) in float32 or wider."""
    return self.llm2vae(hidden).astype(layers.at_least_float32(self.dtype))

  def everything(
    self,
    layout: segments.Layout,
    inputs: Mapping[str, jax.Array | Noised],
    lengths: Mapping[str, types.Lengths],
  ) -> tuple[types.Logits, types.Latent]:
    """Touches every parameter; the method to initialise with."""
    output = self(layout, inputs, lengths)
    return self.logits(output.hidden.und), self.velocity(output.hidden.gen)


def _position_rows(width: int, side: int, grid: tuple[int, int]) -> jax.Array:
  """Returns the sin-cos rows of an image of `grid` tokens, [N, width]."""
  return jnp.asarray(
    layers.sincos_table(width, side)[layers.grid_positions(*grid, side)]
  )

"""Qwen2 mixture of transformers: two experts per layer, one joint attention.

See docs/algorithm.md#model.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from r3jax import types
from r3jax.model import architecture
from r3jax.model import attention
from r3jax.model import by_head
from r3jax.model import layers
from r3jax.model import low_rank
from r3jax.model import splash
from r3jax.parallel import sharding
from r3jax.sequence import segments


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Streams:
  """Hidden states by expert; attention order is und slots, then gen slots.

  Attributes:
    und: of the und expert's slots: text, ViT patches, markers.
    gen: of the gen expert's slots: latents.
  """

  und: types.Hidden  # [B, T_und, D]
  gen: types.Hidden  # [B, T_gen, D]


# Keys or values of all layers: a stack, [L, G, S, K, d], or a tuple of one array per layer.
Entries = Any


class Expert(nn.Module):
  """The parameters and the token-wise half of one expert of one layer.

  Attributes:
    config: sizes.
    dtype: compute dtype.
    rules: where parameters and activations go.
    lora: rank and scale of the adapters.
    adapted: names of this expert's projections with adapters.
    mlp: logical axis of the MLP's hidden width.
  """

  config: architecture.LLMConfig
  dtype: types.DType
  rules: sharding.Rules
  lora: low_rank.LoRA
  adapted: tuple[str, ...]
  mlp: str

  def setup(self):
    """Makes the submodules."""
    c = self.config
    heads = (c.num_heads, c.head_dim)
    kv_heads = (c.num_kv_heads, c.head_dim)
    into_heads = ("embed", "heads", "head_dim")
    into_kv_heads = ("embed", "kv_heads", "head_dim")
    out_of_heads = ("heads", "head_dim", "embed")
    self.input_norm = layers.RMSNorm(c.rms_norm_eps, self.dtype)
    # Queries and keys are rounded once, after norm, RoPE and (queries) scale.
    self.q = self._projection(
      "q", heads, into_heads, use_bias=True, is_wide=True
    )
    self.k = self._projection(
      "k", kv_heads, into_kv_heads, use_bias=True, is_wide=True
    )
    self.v = self._projection("v", kv_heads, into_kv_heads, use_bias=True)
    wide = layers.at_least_float32(self.dtype)
    self.q_norm = layers.RMSNorm(c.rms_norm_eps, wide, axis="head_dim")
    self.k_norm = layers.RMSNorm(c.rms_norm_eps, wide, axis="head_dim")
    num_parts = self.rules.num_parts
    self.o = self._projection(
      "o",
      (c.hidden_size,),
      out_of_heads,
      num_contracted=2,
      num_parts=num_parts("heads"),
    )
    self.post_norm = layers.RMSNorm(c.rms_norm_eps, self.dtype)
    inner = (c.intermediate_size,)
    self.gate = self._projection("gate", inner, ("embed", self.mlp))
    self.up = self._projection("up", inner, ("embed", self.mlp))
    self.down = self._projection(
      "down",
      (c.hidden_size,),
      (self.mlp, "embed"),
      num_parts=num_parts(self.mlp),
    )

  def _projection(
    self,
    name: str,
    features: tuple[int, ...],
    axes: tuple[str, ...],
    num_contracted: int = 1,
    use_bias: bool = False,
    is_wide: bool = False,
    num_parts: int = 1,
  ) -> layers.Projection:
    return layers.Projection(
      features,
      axes,
      num_contracted=num_contracted,
      use_bias=use_bias,
      dtype=self.dtype,
      rank=self.lora.rank if name in self.adapted else 0,
      scale=self.lora.scale,
      is_wide=is_wide,
      num_parts=num_parts,
    )

  def project(self, x: types.Hidden) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns normed queries [B, T, H, d], normed keys and values [B, T, K, d], before RoPE.

    Queries and keys are in float32 or wider, values in the compute dtype.
    """
    # The residual stream is split by rows only.
    y = self.input_norm(self.rules.constrain(x, "rows", None, None))
    query = self.q_norm(self.q(y))
    key = self.k_norm(self.k(y))
    return query, key, self.v(y)

  def finish(self, x: types.Hidden, attended: types.Heads) -> types.Hidden:
    """Adds the attention output and the SwiGLU MLP to the residual stream.

    Args:
      x: [B, T, D] the residual stream before the layer.
      attended: [B, T, H, d].

    Returns:
      [B, T, D] the residual stream after the layer.
    """
    constrain = self.rules.constrain
    x = constrain(x + self.o(attended), "rows", None, None)
    # The MLP's hidden width needs its mesh axes; the rows leave them free.
    y = constrain(self.post_norm(x), "rows", None, None, without=self.mlp)
    gated = nn.silu(self.gate(y)) * self.up(y)
    gated = constrain(gated, "rows", None, self.mlp)
    return constrain(x + self.down(gated), "rows", None, None)


class Layer(nn.Module):
  """One decoder layer: expert-wise projections, joint attention, expert-wise MLPs.

  Attributes:
    config: sizes.
    dtype: compute dtype.
    rules: where parameters and activations go.
    lora: which projections have adapters.
    attention_name: implementation of attention, see `network.Bagel`.
  """

  config: architecture.LLMConfig
  dtype: types.DType
  rules: sharding.Rules
  lora: low_rank.LoRA
  attention_name: str

  def setup(self):
    """Makes the submodules."""
    shared = (self.config, self.dtype, self.rules, self.lora)
    self.und = Expert(*shared, adapted=self.lora.und, mlp="mlp")
    self.gen = Expert(*shared, adapted=self.lora.gen, mlp="gen_mlp")

  def __call__(
    self,
    x: Streams,
    positions: types.Positions,
    masks: tuple[types.Mask | segments.Mask, ...],
    past: tuple[tuple[types.KeyValue, types.KeyValue], ...],
  ) -> tuple[Streams, tuple[jax.Array, jax.Array]]:
    """Returns the new residual streams and this layer's keys (after RoPE) and values.

    Args:
      x: residual streams.
      positions: [B, T] rotary positions.
      masks: one per past source, then that of the slots themselves: whole, [B, T, S], where XLA
        attends, also to decode a token; `segments.Mask`s elsewhere.
      past: keys and values of the past sources, [G, S, K, d].
    """
    constrain = self.rules.constrain
    theta = self.config.rope_theta
    # One attention over the slots of both experts, und first (the order of `segments.Slots`).
    und = self.und.project(x.und)
    gen = self.gen.project(x.gen)
    query, key, value = (
      jnp.concatenate(parts, axis=1) for parts in zip(und, gen, strict=True)
    )
    # The query stays in float32: attention may scale it before it is rounded.
    query = layers.rope(query, positions, theta)
    query = constrain(query, "rows", None, "heads", None)
    # Keys are cached after RoPE: the position of a slot never changes.
    key = layers.rope(key, positions, theta).astype(self.dtype)
    key = constrain(key, "rows", None, "kv_heads", None)
    value = constrain(value, "rows", None, "kv_heads", None)
    sources = [
      attention.Source(source_key, source_value, mask)
      for (source_key, source_value), mask in zip(
        (*past, (key, value)), masks, strict=True
      )
    ]
    attended = self._attend(query, sources)
    attended = constrain(attended, "rows", None, "heads", None)
    num_und = x.und.shape[1]
    streams = Streams(
      und=self.und.finish(x.und, attended[:, :num_und]),
      gen=self.gen.finish(x.gen, attended[:, num_und:]),
    )
    return streams, (key, value)

  def _attend(
    self, query: jax.Array, sources: list[attention.Source]
  ) -> jax.Array:
    """Attends to the sources by the implementation for the platform, [B, T, H, d]."""
    if not isinstance(sources[0].mask, segments.Mask):
      return attention.attend(query, sources)
    if self.attention_name == "by_head":
      return by_head.attend(query, sources)
    return splash.attend(query, sources, self.rules)


class SeparateLayers(nn.Module):
  """All layers, each with parameters of its own instead of a part of a stack.

  A loop over a stack copies the weights of every layer before it reads them, which a decoded token
  pays for. Compiling takes longer, by the number of layers.

  Attributes:
    config: sizes.
    dtype: compute dtype.
    rules: where parameters and activations go.
    lora: which projections have adapters.
    attention_name: implementation of attention, see `network.Bagel`.
  """

  config: architecture.LLMConfig
  dtype: types.DType
  rules: sharding.Rules
  lora: low_rank.LoRA
  attention_name: str

  @nn.compact
  def __call__(
    self,
    x: Streams,
    positions: types.Positions,
    masks: tuple[types.Mask | segments.Mask, ...],
    past: tuple[tuple[Entries, Entries], ...],
  ) -> tuple[Streams, tuple[Entries, Entries]]:
    """Returns what scanned layers do, but keys and values as one array per layer."""
    keys = []
    values = []
    for i in range(self.config.num_layers):
      layer = Layer(
        self.config,
        self.dtype,
        self.rules,
        self.lora,
        self.attention_name,
        name=layer_name(i),
      )
      past_of_layer = tuple((key[i], value[i]) for key, value in past)
      x, (key, value) = layer(x, positions, masks, past_of_layer)
      keys.append(key)
      values.append(value)
    return x, (tuple(keys), tuple(values))


def layer_name(i: int) -> str:
  """Returns the name of a layer's parameters among those of `SeparateLayers`."""
  return f"layer_{i}"


class FinalNorm(nn.Module):
  """The last norm, one per expert.

  Attributes:
    config: sizes.
    dtype: compute dtype.
  """

  config: architecture.LLMConfig
  dtype: types.DType

  def setup(self):
    """Makes the submodules."""
    self.und = layers.RMSNorm(self.config.rms_norm_eps, self.dtype)
    self.gen = layers.RMSNorm(self.config.rms_norm_eps, self.dtype)

  def __call__(self, x: Streams) -> Streams:
    """Returns the normalized residual streams."""
    return Streams(self.und(x.und), self.gen(x.gen))


# What the backward pass keeps: the inputs of the layers, or products of matrices too.
REMAT_POLICIES = {
  "full": None,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def scanned_layers(
  config: architecture.LLMConfig,
  dtype: types.DType,
  remat: str,
  rules: sharding.Rules,
  lora: low_rank.LoRA,
  attention_name: str,
) -> nn.Module:
  """Returns all layers as one scanned module; parameters and caches get a leading L axis.

  Args:
    config: sizes.
    dtype: compute dtype.
    remat: "none", "full" (recompute each layer in the backward pass) or "dots" (keep products).
    rules: where parameters and activations go.
    lora: which projections have adapters.
    attention_name: implementation of attention, see `network.Bagel`.

  Raises:
    ValueError: `remat` is something else.
  """
  layer = Layer
  if remat != "none":
    if remat not in REMAT_POLICIES:
      raise ValueError(
        f"remat must be one of {['none', *REMAT_POLICIES]}; got {remat!r}"
      )
    # Inside a scan the compiler cannot merge the recomputation with the first computation.
    layer = nn.remat(Layer, policy=REMAT_POLICIES[remat], prevent_cse=False)
  # Positions and masks are those of all layers, caches have an axis of layers.
  in_axes: Any = (nn.broadcast, nn.broadcast, 0)
  scanned = nn.scan(
    layer,
    variable_axes={"params": 0},
    split_rngs={"params": True},
    in_axes=in_axes,
    out_axes=0,
    length=config.num_layers,
    metadata_params={nn.PARTITION_NAME: "layers"},
  )
  return scanned(config, dtype, rules, lora, attention_name)

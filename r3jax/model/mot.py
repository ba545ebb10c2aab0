"""Qwen2 mixture of transformers: two experts per layer, one joint attention (R3.md section 2)."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from r3jax import types
from r3jax.model import architecture
from r3jax.model import attention
from r3jax.model import layers
from r3jax.model import low_rank
from r3jax.model import splash
from r3jax.parallel import sharding
from r3jax.sequence import segments


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Streams:
  """Hidden states by expert; attention order is und slots, then gen slots."""

  und: types.Hidden  # [B, T_und, D]
  gen: types.Hidden  # [B, T_gen, D]


def _split(joined: jax.Array, like: Streams) -> Streams:
  num_und = like.und.shape[1]
  return Streams(joined[:, :num_und], joined[:, num_und:])


class Expert(nn.Module):
  """The parameters and the token-wise half of one expert of one layer."""

  config: architecture.LLMConfig
  dtype: types.DType
  rules: sharding.Rules
  lora: low_rank.LoRA
  adapted: tuple[str, ...]  # names of the projections with adapters

  def setup(self):
    c = self.config
    heads, kv_heads = (c.num_heads, c.head_dim), (c.num_kv_heads, c.head_dim)
    into_heads = ("embed", "heads", "head_dim")
    into_kv = ("embed", "kv_heads", "head_dim")
    self.input_norm = layers.RMSNorm(c.rms_norm_eps, self.dtype)
    self.q = self._projection("q", heads, into_heads, use_bias=True)
    self.k = self._projection("k", kv_heads, into_kv, use_bias=True)
    self.v = self._projection("v", kv_heads, into_kv, use_bias=True)
    self.q_norm = layers.RMSNorm(c.rms_norm_eps, self.dtype, axis="head_dim")
    self.k_norm = layers.RMSNorm(c.rms_norm_eps, self.dtype, axis="head_dim")
    self.o = self._projection(
      "o", (c.hidden_size,), ("heads", "head_dim", "embed"), num_contracted=2
    )
    self.post_norm = layers.RMSNorm(c.rms_norm_eps, self.dtype)
    self.gate = self._projection(
      "gate", (c.intermediate_size,), ("embed", "mlp")
    )
    self.up = self._projection("up", (c.intermediate_size,), ("embed", "mlp"))
    self.down = self._projection("down", (c.hidden_size,), ("mlp", "embed"))

  def _projection(
    self, name: str, features: tuple[int, ...], axes: tuple[str, ...], **kinds
  ) -> layers.Projection:
    rank = self.lora.rank if name in self.adapted else 0
    return layers.Projection(
      features,
      axes,
      dtype=self.dtype,
      rank=rank,
      scale=self.lora.scale,
      **kinds,
    )

  def project(self, x: types.Hidden) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns normed queries [B, T, H, d], normed keys and values [B, T, K, d], before RoPE."""
    y = self.input_norm(self.rules.constrain(x, "rows", None, None))
    return self.q_norm(self.q(y)), self.k_norm(self.k(y)), self.v(y)

  def finish(self, x: types.Hidden, attended: types.Heads) -> types.Hidden:
    """Adds the attention output and the SwiGLU MLP to the residual stream."""
    constrain = self.rules.constrain
    x = constrain(x + self.o(attended), "rows", None, None)
    y = constrain(self.post_norm(x), "rows", None, None, without="mlp")
    z = constrain(nn.silu(self.gate(y)) * self.up(y), "rows", None, "mlp")
    return constrain(x + self.down(z), "rows", None, None)


class Layer(nn.Module):
  """One decoder layer: expert-wise projections, joint attention, expert-wise MLPs."""

  config: architecture.LLMConfig
  dtype: types.DType
  rules: sharding.Rules
  lora: low_rank.LoRA

  def setup(self):
    self.und = Expert(
      self.config, self.dtype, self.rules, self.lora, self.lora.und
    )
    self.gen = Expert(
      self.config, self.dtype, self.rules, self.lora, self.lora.gen
    )

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
        attends, `layout.Mask`s where the TPU kernel does.
      past: keys and values of the past sources.
    """
    parts = zip(self.und.project(x.und), self.gen.project(x.gen))
    query, key, value = (jnp.concatenate(part, axis=1) for part in parts)
    constrain, theta = self.rules.constrain, self.config.rope_theta
    query = constrain(
      layers.rope(query, positions, theta), "rows", None, "heads", None
    )
    key = constrain(
      layers.rope(key, positions, theta), "rows", None, "kv_heads", None
    )
    value = constrain(value, "rows", None, "kv_heads", None)
    sources = [
      attention.Source(k, v, mask)
      for (k, v), mask in zip((*past, (key, value)), masks, strict=True)
    ]
    if isinstance(masks[0], segments.Mask):
      mixed = splash.attend(query, sources, self.rules)
    else:
      mixed = attention.attend(query, sources)
    attended = _split(constrain(mixed, "rows", None, "heads", None), x)
    out = Streams(
      self.und.finish(x.und, attended.und), self.gen.finish(x.gen, attended.gen)
    )
    return out, (key, value)


class FinalNorm(nn.Module):
  """The doubled last norm."""

  config: architecture.LLMConfig
  dtype: types.DType

  def setup(self):
    self.und = layers.RMSNorm(self.config.rms_norm_eps, self.dtype)
    self.gen = layers.RMSNorm(self.config.rms_norm_eps, self.dtype)

  def __call__(self, x: Streams) -> Streams:
    return Streams(self.und(x.und), self.gen(x.gen))


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
) -> nn.Module:
  """Returns all layers as one scanned module; parameters and caches get a leading L axis.

  Args:
    config: sizes.
    dtype: compute dtype.
    remat: "none", "full" (recompute each layer in the backward pass) or "dots" (keep products).
    rules: where parameters and activations go.
    lora: which projections have adapters.
  """
  layer = Layer
  if remat != "none":
    if remat not in REMAT_POLICIES:
      raise ValueError(
        f"remat must be one of {['none', *REMAT_POLICIES]}; got {remat!r}"
      )
    layer = nn.remat(Layer, policy=REMAT_POLICIES[remat], prevent_cse=False)
  scanned = nn.scan(
    layer,
    variable_axes={"params": 0},
    split_rngs={"params": True},
    in_axes=(nn.broadcast, nn.broadcast, 0),
    out_axes=0,
    length=config.num_layers,
    metadata_params={nn.PARTITION_NAME: "layers"},
  )
  return scanned(config, dtype, rules, lora)

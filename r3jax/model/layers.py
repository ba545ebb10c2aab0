"""Pieces shared by the towers: norms, projections, rotary positions, fixed tables, patches.

Parameters are float32 and carry logical axis names; `dtype` is the dtype of the computation. What
has to be accurate (norm statistics, softmax, angles) runs in float32, or wider where the input is.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float
import numpy as np

from r3jax import types

ADAPTERS = ("lora_a", "lora_b")  # parameters of a low-rank update
MAX_PERIOD = 10000.0  # longest wavelength / (2 pi) of the fixed sinusoids


def at_least_float32(dtype: types.DType) -> types.DType:
  """Returns `dtype`, or float32 where `dtype` is narrower (or an integer)."""
  return jnp.promote_types(dtype, jnp.float32)


class RMSNorm(nn.Module):
  """`x / sqrt(mean(x^2) + eps) * scale` over the last axis, computed in float32 or wider."""

  eps: float
  dtype: types.DType = jnp.float32
  axis: str = "norm"  # logical name of the scale

  @nn.compact
  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    init = nn.with_logical_partitioning(nn.initializers.ones, (self.axis,))
    scale = self.param("scale", init, (x.shape[-1],))
    x = x.astype(at_least_float32(x.dtype))
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return (x * jax.lax.rsqrt(mean_square + self.eps) * scale).astype(
      self.dtype
    )


class Projection(nn.Module):
  """Linear map `[..., inputs] -> [..., features]` with named axes, several on either side.

  With a rank it makes the two parameters of a low-rank update (see `lora.py`), and uses them where
  it is given them: parameters without them are those of the map that has not been updated.
  """

  features: tuple[int, ...]
  axes: tuple[str, ...]  # logical names of the kernel's axes, inputs first
  num_contracted: int = 1  # how many of the last axes of the input are inputs
  use_bias: bool = False
  dtype: types.DType = jnp.float32
  rank: int = 0  # of the low-rank update; 0 is none
  scale: float = 1.0  # of the low-rank update

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    inputs = x.shape[x.ndim - self.num_contracted :]
    in_axis = tuple(range(len(inputs)))
    out_axis = tuple(range(len(inputs), len(inputs) + len(self.features)))
    init = nn.initializers.variance_scaling(
      1.0, "fan_in", "normal", in_axis, out_axis
    )
    init = nn.with_logical_partitioning(init, self.axes)
    kernel = self.param("kernel", init, inputs + self.features).astype(
      self.dtype
    )
    contracted = tuple(range(x.ndim - len(inputs), x.ndim))
    y = jax.lax.dot_general(
      x.astype(self.dtype), kernel, ((contracted, in_axis), ((), ()))
    )
    if self.rank and (
      self.is_initializing() or self.has_variable("params", "lora_a")
    ):
      y = y + self._update(x.astype(self.dtype), inputs)
    if self.use_bias:
      zeros = nn.with_logical_partitioning(
        nn.initializers.zeros, self.axes[len(inputs) :]
      )
      y = y + self.param("bias", zeros, self.features).astype(self.dtype)
    return y

  def _update(self, x: jax.Array, inputs: tuple[int, ...]) -> jax.Array:
    """Returns scale (x A) B; A is drawn as a kernel is, B starts at zero."""
    count = len(inputs)
    draw = nn.initializers.variance_scaling(
      1.0, "fan_in", "normal", tuple(range(count)), (count,)
    )
    down = nn.with_logical_partitioning(draw, (*self.axes[:count], "rank"))
    up = nn.with_logical_partitioning(
      nn.initializers.zeros, ("rank", *self.axes[count:])
    )
    a = self.param("lora_a", down, (*inputs, self.rank)).astype(self.dtype)
    b = self.param("lora_b", up, (self.rank, *self.features)).astype(self.dtype)
    return jnp.tensordot(
      self.scale * jnp.tensordot(x, a, axes=count), b, axes=1
    )


def rope(
  x: types.Heads, positions: types.Positions, theta: float
) -> types.Heads:
  """Rotates channel i of a head with channel i + d/2 by `position * theta^(-2i/d)`.

  Args:
    x: [B, T, H, d] queries or keys; d is even.
    positions: [B, T] rotary positions.
    theta: base of the wavelengths.

  Returns:
    The rotated `x`, in its dtype; angles are float32 or wider.
  """
  half = x.shape[-1] // 2
  dtype = at_least_float32(x.dtype)
  frequencies = jnp.asarray(float(theta) ** (-np.arange(half) / half), dtype)
  # [B, T, 1, d/2]
  angles = positions.astype(dtype)[..., None, None] * frequencies
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  first, second = jnp.split(x.astype(dtype), 2, axis=-1)
  rotated = [first * cos - second * sin, second * cos + first * sin]
  return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def full_attention(
  query: types.Heads, key: types.Heads, value: types.Heads
) -> types.Heads:
  """Attends from every token to every token: `softmax(q k^T / sqrt(d)) v`, one head per axis 2."""
  logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(
    query.shape[-1]
  )
  weights = jax.nn.softmax(
    logits.astype(at_least_float32(logits.dtype)), axis=-1
  )
  return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(value.dtype), value)


def timestep_features(t: types.Time, width: int = 256) -> Float[Array, "B F"]:
  """Returns `[cos(t f_i), sin(t f_i)]` with `f_i = 10000^(-i / (width/2))` (R3.md section 2).

  Args:
    t: flow times in [0, 1], used unscaled.
    width: number of features, even.
  """
  half = width // 2
  dtype = at_least_float32(t.dtype)
  frequencies = jnp.asarray(MAX_PERIOD ** (-np.arange(half) / half), dtype)
  angles = t.astype(dtype)[..., None] * frequencies
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def sincos_table(width: int, side: int) -> np.ndarray:
  """Makes the fixed 2-D position table: `[side * side, width]` float64, row `r * side + c`.

  The first half of the channels encodes the column, the second the row; each half is
  `[sin(p w_i), cos(p w_i)]` with `w_i = 10000^(-i / (width/4))` (R3.md section 2).

  Raises:
    ValueError: `width` is not a multiple of 4.
  """
  if width % 4:
    raise ValueError(
      f"the width of a sin-cos table must be a multiple of 4; got {width}"
    )
  quarter = width // 4
  angles = np.arange(side)[:, None] * MAX_PERIOD ** (
    -np.arange(quarter) / quarter
  )
  # [side, width/2]
  line = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
  columns = np.tile(line, (side, 1))
  rows = np.repeat(line, side, axis=0)
  return np.concatenate([columns, rows], axis=1)


def grid_positions(height: int, width: int, side: int) -> np.ndarray:
  """Returns [height * width] int32 ids, `row * side + col`, of a grid in a position table.

  Raises:
    ValueError: the grid does not fit a table of `side` by `side`.
  """
  if max(height, width) > side:
    raise ValueError(
      f"a grid must fit the {side}x{side} position table; got {height}x{width}"
    )
  return (
    (np.arange(height)[:, None] * side + np.arange(width))
    .reshape(-1)
    .astype(np.int32)
  )


def patchify(x: Float[Array, "B h w c"], patch: int) -> Float[Array, "B N p"]:
  """Cuts into row-major tokens of `patch * patch * c` numbers, ordered (row, column, channel).

  Raises:
    ValueError: a side is not a multiple of `patch`.
  """
  batch, height, width, channels = x.shape
  if height % patch or width % patch:
    raise ValueError(
      f"both sides must be multiples of the patch ({patch}); got {height}x{width}"
    )
  x = x.reshape(batch, height // patch, patch, width // patch, patch, channels)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(
    batch, -1, patch * patch * channels
  )


def unpatchify(
  tokens: Float[Array, "B N p"], grid: tuple[int, int], patch: int
) -> Float[Array, "B h w c"]:
  """Undoes `patchify`; `grid` counts tokens down and across.

  Raises:
    ValueError: the number of tokens is not that of the grid.
  """
  batch, count, _ = tokens.shape
  height, width = grid
  if count != height * width:
    raise ValueError(
      f"a {height}x{width} grid must have {height * width} tokens; got {count}"
    )
  x = tokens.reshape(batch, height, width, patch, patch, -1)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(
    batch, height * patch, width * patch, -1
  )

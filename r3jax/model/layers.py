"""Layers that several models share: norms, projections, rotary positions, fixed tables, patches.

Parameters are float32 and carry logical axis names; `dtype` is the dtype of the computation. What
has to be accurate (norm statistics, softmax, angles) runs in float32, or wider where the input is.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float
import numpy as np

from r3jax import types

ADAPTERS = ("lora_a", "lora_b")  # the parameters A and B of a low-rank update
MAX_PERIOD = 10000.0  # longest wavelength / (2 pi) of the fixed sinusoids


def at_least_float32(dtype: types.DType) -> types.DType:
  """Returns `dtype`, or float32 where `dtype` is narrower (or an integer)."""
  return jnp.promote_types(dtype, jnp.float32)


class RMSNorm(nn.Module):
  """Computes `x / √(mean(x²) + eps) * scale` over the last axis, in float32 or wider.

  Attributes:
    eps: added to the mean square.
    dtype: of the result.
    axis: logical name of the scale's axis.
  """

  eps: float
  dtype: types.DType = jnp.float32
  axis: str = "norm"

  @nn.compact
  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Returns x, normalized over its last axis."""
    init = nn.with_logical_partitioning(nn.initializers.ones, (self.axis,))
    scale = jnp.asarray(self.param("scale", init, (x.shape[-1],)))
    # The parameter stays float32 too, see `parameters.narrowed`.
    x = x.astype(at_least_float32(x.dtype))
    mean_square = jnp.square(x).mean(axis=-1, keepdims=True)
    normed = x * jax.lax.rsqrt(mean_square + self.eps)
    return (normed * scale).astype(self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(
  x: jax.Array, kernel: jax.Array, num_contracted: int, dtype: types.DType
) -> jax.Array:
  """Returns x [..., inputs] times a kernel [inputs, features], [..., features].

  Its gradient differs from JAX's own in two ways. The kernel's gradient has the inputs as its first
  factor. XLA transposes the first factor for CPUs, and JAX's is the gradient of the result, which
  is then computed column by column: a layer's gradient took 1.5 times as long. And the gradient of
  x is summed into the dtype of x, which devices with parts of the features send each other.

  Args:
    x: [..., inputs].
    kernel: [inputs, features], in the dtype of x.
    num_contracted: how many axes the inputs have.
    dtype: of the result and of the kernel's gradient, before it is rounded to the dtype of x.
  """
  contracted = tuple(range(x.ndim - num_contracted, x.ndim))
  inputs = tuple(range(num_contracted))
  return jax.lax.dot_general(
    x, kernel, ((contracted, inputs), ((), ())), preferred_element_type=dtype
  )


def _product_forward(
  x: jax.custom_derivatives.CustomVJPPrimal,
  kernel: jax.custom_derivatives.CustomVJPPrimal,
  num_contracted: int,
  dtype: types.DType,
) -> tuple[jax.Array, tuple[jax.Array | None, jax.Array | None]]:
  """Returns the product, and of each factor what the gradient of the other one needs."""
  result = jnp.asarray(product(x.value, kernel.value, num_contracted, dtype))
  # A kernel that is not trained needs no gradient.
  for_kernel = x.value if kernel.perturbed else None
  for_x = kernel.value if x.perturbed else None
  return result, (for_kernel, for_x)


def _product_backward(
  num_contracted: int,
  dtype: types.DType,
  factors: tuple[jax.Array | None, jax.Array | None],
  gradient: jax.Array,
) -> tuple[jax.Array | None, jax.Array | None]:
  """Returns the gradients of x and of the kernel, given that of the product."""
  x, kernel = factors
  to_x = None
  to_kernel = None
  if kernel is not None:
    of_kernel = tuple(range(num_contracted, kernel.ndim))
    of_gradient = tuple(range(gradient.ndim - len(of_kernel), gradient.ndim))
    features = ((of_gradient, of_kernel), ((), ()))
    to_x = jax.lax.dot_general(
      gradient, kernel, features, preferred_element_type=kernel.dtype
    )
  if x is not None:
    outer = tuple(range(x.ndim - num_contracted))
    rows = ((outer, outer), ((), ()))
    to_kernel = jax.lax.dot_general(
      x, gradient, rows, preferred_element_type=dtype
    ).astype(x.dtype)
  return to_x, to_kernel


product.defvjp(_product_forward, _product_backward, symbolic_zeros=True)


class Projection(nn.Module):
  """A linear map [..., inputs] -> [..., features] with named axes, several on either side.

  With a rank it makes the two parameters of a low-rank update (see `low_rank.py`), and applies the
  update where the parameters hold them; without them it is the map as it was before the update.

  Attributes:
    features: sizes of the output axes.
    axes: logical names of the kernel's axes, inputs first.
    num_contracted: how many of the last axes of the input are contracted.
    use_bias: adds a bias.
    dtype: compute dtype.
    rank: of the low-rank update; 0 is none.
    scale: factor of the low-rank update.
    is_wide: returns the sums in float32 or wider instead of rounding them to `dtype`, for outputs
      that a log-prob, a norm or a ratio follows.
    num_parts: devices that each hold a part of the first contracted axis, and sum over that.
  """

  features: tuple[int, ...]
  axes: tuple[str, ...]
  num_contracted: int = 1
  use_bias: bool = False
  dtype: types.DType = jnp.float32
  rank: int = 0
  scale: float = 1.0
  is_wide: bool = False
  num_parts: int = 1

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns [..., features] of [..., inputs]."""
    num_inputs = self.num_contracted
    contracted = tuple(range(x.ndim - num_inputs, x.ndim))
    inputs = tuple(x.shape[axis] for axis in contracted)
    kernel = self._parameter(
      "kernel",
      _variance_scaling(num_inputs, len(self.features)),
      self.axes,
      inputs + self.features,
    )
    # All input axes are contracted at once: each keeps its logical name, and so its sharding.
    x = x.astype(self.dtype)
    wide = at_least_float32(self.dtype)
    result_dtype = wide if self.is_wide else self.dtype
    # A reference policy is the same module without the adapters among its parameters.
    holds_update = self.has_variable("params", "lora_a")
    has_update = self.rank > 0 and (self.is_initializing() or holds_update)
    if has_update:
      # A bias is added before the one rounding.
      y = self._updated(x, kernel, wide if self.use_bias else result_dtype)
    else:
      y = jnp.asarray(product(x, kernel, num_inputs, result_dtype))
    if self.use_bias:
      bias = self._parameter(
        "bias", nn.initializers.zeros, self.axes[num_inputs:], self.features
      )
      # Added in float32, so that its gradient, a sum over all rows, is a float32 sum.
      y = y.astype(wide) + bias.astype(wide)
    return y.astype(result_dtype)

  def _updated(
    self, x: jax.Array, kernel: jax.Array, dtype: types.DType
  ) -> jax.Array:
    """Returns x W + scale (x A) B; A is drawn as a kernel is, B starts at zero.

    Rounded after the update is added: less than half of the spacing of a rounded number would be
    rounded away, so that small updates would not change the output at all. The update alone may be
    rounded first, which saves memory: its error is small beside the update itself.

    Where devices hold parts of the inputs, every one rounds the sum over its part, with the update
    in it. They then send each other numbers of `dtype`, and not of float32.

    Args:
      x: [..., inputs].
      kernel: W, [inputs, features].
      dtype: of the result.
    """
    num_inputs = self.num_contracted
    inputs = kernel.shape[:num_inputs]
    a = self._parameter(
      "lora_a",
      _variance_scaling(num_inputs, 1),
      (*self.axes[:num_inputs], "rank"),
      (*inputs, self.rank),
    )
    b = self._parameter(
      "lora_b",
      nn.initializers.zeros,
      ("rank", *self.axes[num_inputs:]),
      (self.rank, *self.features),
    )
    wide = at_least_float32(self.dtype)

    def updated(x: jax.Array, kernel: jax.Array, a: jax.Array) -> jax.Array:
      y = jnp.asarray(product(x, kernel, num_inputs, wide))
      # x A first: it has `rank` columns, A B would have as many as the kernel.
      scaled = self.scale * jnp.tensordot(x, a, axes=num_inputs)
      update = jnp.tensordot(scaled, b, axes=1)
      return (y + update.astype(wide)).astype(dtype)

    if self.num_parts == 1:
      return updated(x, kernel, a)
    # The first contracted axis becomes two: its parts, and the inputs of a part.
    part = (inputs[0] // self.num_parts, *inputs[1:])
    outer = x.shape[: x.ndim - num_inputs]
    split_x = x.reshape(*outer, self.num_parts, *part)
    parts = jax.vmap(updated)(
      jnp.moveaxis(split_x, len(outer), 0),
      kernel.reshape(self.num_parts, *part, *self.features),
      a.reshape(self.num_parts, *part, self.rank),
    )
    # Not jnp.sum, which would widen the numbers first.
    zero = np.zeros((), dtype)
    return jax.lax.reduce(parts, zero, jax.lax.add, dimensions=(0,))

  def _parameter(
    self,
    name: str,
    initializer: nn.initializers.Initializer,
    axes: tuple[str, ...],
    shape: tuple[int, ...],
  ) -> jax.Array:
    """Returns a parameter with logical axis names, in the compute dtype."""
    init = nn.with_logical_partitioning(initializer, axes)
    return jnp.asarray(self.param(name, init, shape)).astype(self.dtype)


def _variance_scaling(
  num_inputs: int, num_outputs: int
) -> nn.initializers.Initializer:
  """Returns an initializer for a kernel whose first axes are the inputs: variance 1 / fan-in."""
  in_axis = tuple(range(num_inputs))
  out_axis = tuple(range(num_inputs, num_inputs + num_outputs))
  return nn.initializers.variance_scaling(
    1.0, "fan_in", "normal", in_axis, out_axis
  )


def rope(
  x: types.Heads, positions: types.Positions, theta: float
) -> types.Heads:
  """Rotates channel i of a head with channel i + d/2 by the angle position * theta^(-2i/d).

  Source: RoPE (arXiv 2104.09864) in the half-split form of Qwen2.

  Args:
    x: [B, T, H, d] queries or keys; d is even.
    positions: [B, T] rotary positions.
    theta: base of the wavelengths.

  Returns:
    The rotated `x`, in float32 or wider, as the angles are.
  """
  half = x.shape[-1] // 2
  dtype = at_least_float32(x.dtype)
  # Powers in float64 on the host, rounded once.
  exponents = -np.arange(half) / half
  frequencies = jnp.asarray(float(theta) ** exponents, dtype)
  angles = positions.astype(dtype)[..., None, None] * frequencies
  cos = jnp.cos(angles)  # [B, T, 1, d/2]
  sin = jnp.sin(angles)
  wide = x.astype(dtype)
  first, second = jnp.split(wide, 2, axis=-1)
  rotated = [
    first * cos - second * sin,
    second * cos + first * sin,
  ]
  return jnp.concatenate(rotated, axis=-1)


def full_attention(
  query: types.Heads, key: types.Heads, value: types.Heads
) -> types.Heads:
  """Attends from every token to every token of an image: softmax(q kᵀ / √d) v.

  Args:
    query: [B, N, H, d].
    key: [B, N, H, d].
    value: [B, N, H, d].

  Returns:
    [B, N, H, d] in the value's dtype; scores and softmax are in float32 or wider.
  """
  root = math.sqrt(query.shape[-1])
  # Rounded scores would be off by 2^-9 of themselves, and the weights by the exponential of that.
  scores = jnp.einsum(
    "bqhd,bkhd->bhqk",
    query,
    key,
    preferred_element_type=at_least_float32(query.dtype),
  )
  # Without the barrier libtpu 0.0.42 ends with signal 11 when it compiles the ViT for tpu7x.
  scores = jax.lax.optimization_barrier(scores)
  weights = jax.nn.softmax(scores / root, axis=-1).astype(value.dtype)
  return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


def timestep_features(t: types.Time, width: int = 256) -> Float[Array, "B F"]:
  """Returns sinusoids of flow times: [cos(t fᵢ), sin(t fᵢ)] with fᵢ = 10000^(-i / (F/2)).

  Source: docs/algorithm.md#model.

  Args:
    t: [B] in [0, 1], used unscaled.
    width: F, even.

  Returns:
    [B, F] in float32 or wider.
  """
  half = width // 2
  dtype = at_least_float32(t.dtype)
  # Powers in float64 on the host, rounded once.
  exponents = -np.arange(half) / half
  frequencies = jnp.asarray(MAX_PERIOD**exponents, dtype)
  angles = t.astype(dtype)[..., None] * frequencies
  features = [jnp.cos(angles), jnp.sin(angles)]
  return jnp.concatenate(features, axis=-1)


def sincos_table(width: int, side: int) -> np.ndarray:
  """Makes the fixed 2-D position table of a square grid.

  The first half of the channels encodes the column, the second the row; each half is
  [sin(p wᵢ), cos(p wᵢ)] with wᵢ = 10000^(-i / (width/4)). Source: docs/algorithm.md#model.

  Args:
    width: channels.
    side: rows and columns of the grid.

  Returns:
    [side * side, width] float64; the position (row, column) is entry row * side + column.

  Raises:
    ValueError: `width` is not a multiple of 4.
  """
  if width % 4:
    raise ValueError(
      f"the width of a sin-cos table must be a multiple of 4; got {width}"
    )
  quarter = width // 4
  exponents = -np.arange(quarter) / quarter
  angles = np.arange(side)[:, None] * MAX_PERIOD**exponents
  sinusoids = [np.sin(angles), np.cos(angles)]
  line = np.concatenate(sinusoids, axis=1)  # [side, width/2]
  # Entry row * side + column: columns vary fastest.
  columns = np.tile(line, (side, 1))
  rows = np.repeat(line, side, axis=0)
  return np.concatenate([columns, rows], axis=1)


def grid_positions(height: int, width: int, side: int) -> np.ndarray:
  """Returns the entries of a position table that a smaller grid uses.

  Args:
    height: rows of the grid.
    width: columns of the grid.
    side: rows and columns of the table.

  Returns:
    [height * width] int32, row * side + column.

  Raises:
    ValueError: the grid does not fit a table of `side` by `side`.
  """
  if max(height, width) > side:
    raise ValueError(
      f"a grid must fit the {side}x{side} position table; got {height}x{width}"
    )
  row_starts = np.arange(height)[:, None] * side
  entries = row_starts + np.arange(width)
  return entries.reshape(-1).astype(np.int32)


def patchify(x: Float[Array, "B h w c"], patch: int) -> types.Patches:
  """Cuts images or feature maps into square patches.

  Args:
    x: [B, h, w, c].
    patch: side of a patch.

  Returns:
    [B, N, p] row-major; the p = patch * patch * c numbers are ordered (row, column, channel).

  Raises:
    ValueError: a side is not a multiple of `patch`.
  """
  batch, height, width, channels = x.shape
  rows = height // patch
  columns = width // patch
  if height % patch or width % patch:
    raise ValueError(
      f"both sides must be multiples of the patch ({patch}); got {height}x{width}"
    )
  # [B, row of patches, row in the patch, column of patches, column in the patch, c]
  x = x.reshape(batch, rows, patch, columns, patch, channels)
  patches = x.transpose(0, 1, 3, 2, 4, 5)
  return patches.reshape(batch, -1, patch * patch * channels)


def unpatchify(
  tokens: types.Patches, grid: tuple[int, int], patch: int
) -> Float[Array, "B h w c"]:
  """Undoes `patchify`.

  Args:
    tokens: [B, N, p].
    grid: rows and columns of patches.
    patch: side of a patch.

  Returns:
    [B, h, w, c].

  Raises:
    ValueError: the number of tokens is not that of the grid.
  """
  batch, num_tokens, _ = tokens.shape
  rows, columns = grid
  if num_tokens != rows * columns:
    raise ValueError(
      f"a {rows}x{columns} grid must have {rows * columns} tokens; got {num_tokens}"
    )
  x = tokens.reshape(batch, rows, columns, patch, patch, -1)
  pixels = x.transpose(0, 1, 3, 2, 4, 5)
  return pixels.reshape(batch, rows * patch, columns * patch, -1)

"""FLUX autoencoder, channels last: pixels <-> latent tokens (docs/algorithm.md#model).

Module names follow the released names: `encoder.down.0.block.1.conv1` is
`encoder/down_0/block_1/conv1`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float

from r3jax import types
from r3jax.model import architecture
from r3jax.model import layers

Features = Float[Array, "B h w c"]
Padding = tuple[
  tuple[int, int], tuple[int, int]
]  # zeros (before, after) a side

NUM_GROUPS = 32
NORM_EPS = 1e-6
SAME: Padding = ((1, 1), (1, 1))
BOTTOM_RIGHT: Padding = ((0, 1), (0, 1))  # of the stride-2 convolutions


_kernel_init = nn.with_logical_partitioning(
  nn.initializers.lecun_normal(), (None, None, "conv_in", "conv_out")
)
_bias_init = nn.with_logical_partitioning(nn.initializers.zeros, ("conv_out",))


def _conv(
  features: int,
  dtype: types.DType,
  name: str | None = None,
  stride: int = 1,
  padding: Padding = SAME,
) -> nn.Conv:
  return nn.Conv(
    features,
    kernel_size=(3, 3),
    strides=stride,
    padding=padding,
    dtype=dtype,
    kernel_init=_kernel_init,
    bias_init=_bias_init,
    name=name,
  )


class Pointwise(nn.Module):
  """Convolves with a 1x1 kernel, as a product of matrices, which is faster on CPUs.

  Attributes:
    channels: width of the output.
    dtype: compute dtype.
  """

  channels: int
  dtype: types.DType

  @nn.compact
  def __call__(self, x: Features) -> Features:
    """Returns [B, h, w, channels] of [B, h, w, c]."""
    kernel_shape = (1, 1, x.shape[-1], self.channels)
    kernel = jnp.asarray(self.param("kernel", _kernel_init, kernel_shape))
    bias = jnp.asarray(self.param("bias", _bias_init, (self.channels,)))
    matrix = kernel[0, 0].astype(self.dtype)
    return x.astype(self.dtype) @ matrix + bias.astype(self.dtype)


class GroupNorm(nn.Module):
  """Computes (x - mean) / √(variance + eps) * scale + bias by groups of channels.

  Statistics of an image are over all positions and the channels of a group. Positions are summed
  first, channel by channel: in groups, XLA would copy the features into another layout.

  Attributes:
    dtype: of the result; statistics are in float32 or wider.
  """

  dtype: types.DType

  @nn.compact
  def __call__(self, x: Features) -> Features:
    """Returns the normalized features, in the shape of x."""
    channels = x.shape[-1]
    ones = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
    zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("norm",))
    scale = jnp.asarray(self.param("scale", ones, (channels,)))
    bias = jnp.asarray(self.param("bias", zeros, (channels,)))
    x = x.astype(layers.at_least_float32(x.dtype))

    def mean_of_group(y: Features) -> Features:
      mean = y.mean(axis=(1, 2)).reshape(-1, NUM_GROUPS, channels // NUM_GROUPS)
      mean = mean.mean(axis=-1, keepdims=True)
      every_channel = jnp.broadcast_to(
        mean, (*mean.shape[:2], channels // NUM_GROUPS)
      )
      return every_channel.reshape(-1, 1, 1, channels)

    centered = x - mean_of_group(x)
    # The fast variance, E[x²] - E[x]², loses digits by cancellation.
    variance = mean_of_group(jnp.square(centered))
    factor = jax.lax.rsqrt(variance + NORM_EPS) * scale
    return (centered * factor + bias).astype(self.dtype)


class ResBlock(nn.Module):
  """Computes x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 shortcut for x.

  Attributes:
    in_channels: width of the input.
    channels: width of the output; the shortcut is the identity where it is that of the input.
    dtype: compute dtype.
  """

  in_channels: int
  channels: int
  dtype: types.DType

  def setup(self):
    """Makes the submodules."""
    self.norm1 = GroupNorm(self.dtype)
    self.conv1 = _conv(self.channels, self.dtype)
    self.norm2 = GroupNorm(self.dtype)
    self.conv2 = _conv(self.channels, self.dtype)
    if self.in_channels != self.channels:
      self.nin_shortcut = Pointwise(self.channels, self.dtype)

  def __call__(self, x: Features) -> Features:
    """Returns [B, h, w, channels] of [B, h, w, in_channels]."""
    y = self.conv1(nn.silu(self.norm1(x)))
    y = self.conv2(nn.silu(self.norm2(y)))
    if self.in_channels != self.channels:
      x = self.nin_shortcut(x)
    return y + x


class Attention(nn.Module):
  """Residual single-head attention over all positions.

  Attributes:
    channels: width of input and output.
    dtype: compute dtype.
  """

  channels: int
  dtype: types.DType

  def setup(self):
    """Makes the submodules."""
    self.norm = GroupNorm(self.dtype)
    self.q = Pointwise(self.channels, self.dtype)
    self.k = Pointwise(self.channels, self.dtype)
    self.v = Pointwise(self.channels, self.dtype)
    self.proj_out = Pointwise(self.channels, self.dtype)

  def __call__(self, x: Features) -> Features:
    """Returns the features after attention, in the shape of x."""
    y = self.norm(x)
    single_head = (x.shape[0], -1, 1, self.channels)  # [B, N, H = 1, d]
    query = self.q(y).reshape(single_head)
    key = self.k(y).reshape(single_head)
    value = self.v(y).reshape(single_head)
    attended = layers.full_attention(query, key, value).reshape(x.shape)
    return x + self.proj_out(attended)


class Middle(nn.Module):
  """Residual block, attention, residual block at the deepest level.

  Attributes:
    channels: width of input and output.
    dtype: compute dtype.
  """

  channels: int
  dtype: types.DType

  def setup(self):
    """Makes the submodules."""
    self.block_1 = ResBlock(self.channels, self.channels, self.dtype)
    self.attn_1 = Attention(self.channels, self.dtype)
    self.block_2 = ResBlock(self.channels, self.channels, self.dtype)

  def __call__(self, x: Features) -> Features:
    """Returns the features after the deepest level, in the shape of x."""
    return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
  """Halves the sides by a convolution (a module of its own for its released name).

  Attributes:
    channels: width of input and output.
    dtype: compute dtype.
  """

  channels: int
  dtype: types.DType

  def setup(self):
    """Makes the submodules."""
    self.conv = _conv(self.channels, self.dtype, stride=2, padding=BOTTOM_RIGHT)

  def __call__(self, x: Features) -> Features:
    """Returns [B, h/2, w/2, channels] of [B, h, w, channels]."""
    return self.conv(x)


class Upsample(nn.Module):
  """Doubles the sides (nearest neighbor), then convolves.

  Attributes:
    channels: width of input and output.
    dtype: compute dtype.
  """

  channels: int
  dtype: types.DType

  def setup(self):
    """Makes the submodules."""
    self.adds_taps = adds_taps(self.dtype)
    if self.adds_taps:
      self.conv = DoublingConv(self.channels, self.dtype)
    else:
      self.conv = _conv(self.channels, self.dtype)

  def __call__(self, x: Features) -> Features:
    """Returns [B, 2 h, 2 w, channels] of [B, h, w, channels]."""
    if not self.adds_taps:
      x = x.repeat(2, axis=1).repeat(2, axis=2)
    return self.conv(x)


def adds_taps(dtype: types.DType) -> bool:
  """Returns whether upsampling adds up kernel weights: a narrow type would round the sums."""
  return dtype == layers.at_least_float32(dtype)


class DoublingConv(nn.Module):
  """Convolves features with a 3x3 kernel after doubling their sides (nearest neighbor).

  Two of the three rows (columns) under the kernel are copies of one. Their weights are added up
  first, so that a 2x2 kernel for each of the four places in a doubled cell remains: 4/9 of the
  products, and no doubled input.

  Attributes:
    channels: width of the output.
    dtype: compute dtype, float32 or wider.
  """

  channels: int
  dtype: types.DType

  @nn.compact
  def __call__(self, x: Features) -> Features:
    """Returns [B, 2 h, 2 w, channels] of [B, h, w, c]."""
    batch, height, width, in_channels = x.shape
    kernel = jnp.asarray(
      self.param("kernel", _kernel_init, (3, 3, in_channels, self.channels))
    )
    bias = jnp.asarray(self.param("bias", _bias_init, (self.channels,)))
    by_row = _added_taps(kernel.astype(self.dtype))  # [place, 2, 3, c, f]
    by_column = _added_taps(jnp.moveaxis(by_row, 2, 0))
    # [column place, 2, row place, 2, c, f] -> [2, 2, c, places, f]
    small = by_column.transpose(3, 1, 4, 2, 0, 5)
    small = small.reshape(2, 2, in_channels, 4 * self.channels)

    corners = jax.lax.conv_general_dilated(
      x.astype(self.dtype),
      small,
      window_strides=(1, 1),
      padding=SAME,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    corners = corners.reshape(batch, height + 1, width + 1, 2, 2, self.channels)
    rows = []
    for i in range(2):
      columns = [
        corners[:, i : i + height, j : j + width, i, j] for j in range(2)
      ]
      rows.append(jnp.stack(columns, axis=3))
    doubled = jnp.stack(rows, axis=2)  # [B, h, 2, w, 2, f]
    doubled = doubled.reshape(batch, 2 * height, 2 * width, self.channels)
    return doubled + bias.astype(self.dtype)


def _added_taps(kernel: jax.Array) -> jax.Array:
  """Returns the taps of both places of a doubled cell, [2, 2, ...] of [3, ...]."""
  first, second, third = kernel
  places = [
    jnp.stack([first, second + third]),
    jnp.stack([first + second, third]),
  ]
  return jnp.stack(places)


class Level(nn.Module):
  """The residual blocks of one level, then perhaps a change of resolution.

  Attributes:
    in_channels: width of the input.
    channels: width of the output.
    num_blocks: residual blocks.
    dtype: compute dtype.
    resample: "downsample" halves the sides, "upsample" doubles them, "" keeps them.
  """

  in_channels: int
  channels: int
  num_blocks: int
  dtype: types.DType
  resample: str = ""

  @nn.compact
  def __call__(self, x: Features) -> Features:
    """Returns the features after the level."""
    in_channels = self.in_channels
    for i in range(self.num_blocks):
      block = ResBlock(
        in_channels, self.channels, self.dtype, name=f"block_{i}"
      )
      x = block(x)
      in_channels = self.channels
    if self.resample == "downsample":
      x = Downsample(self.channels, self.dtype, name="downsample")(x)
    elif self.resample == "upsample":
      x = Upsample(self.channels, self.dtype, name="upsample")(x)
    return x


class Encoder(nn.Module):
  """Maps pixels [B, h, w, 3] to posterior means and log-variances of latent cells.

  The output is [B, h/8, w/8, 2 z] with z latent channels.

  Attributes:
    config: sizes.
    dtype: compute dtype.
  """

  config: architecture.AutoencoderConfig
  dtype: types.DType

  @nn.compact
  def __call__(self, pixels: types.Pixels) -> Features:
    """Returns the posterior of pixels in [-1, 1], [B, h/8, w/8, 2 z]."""
    c = self.config
    widths = [c.channels * m for m in c.multipliers]
    x = _conv(c.channels, self.dtype, name="conv_in")(pixels)
    in_width = c.channels
    for i, width in enumerate(widths):
      is_last = i == len(widths) - 1
      level = Level(
        in_channels=in_width,
        channels=width,
        num_blocks=c.num_res_blocks,
        dtype=self.dtype,
        resample="" if is_last else "downsample",
        name=f"down_{i}",
      )
      x = level(x)
      in_width = width
    middle = Middle(in_width, self.dtype, name="mid")
    x = middle(x)
    x = nn.silu(GroupNorm(self.dtype, name="norm_out")(x))
    return _conv(2 * c.latent_channels, self.dtype, name="conv_out")(x)


class Decoder(nn.Module):
  """Maps unscaled latents [B, h, w, z] to pixels [B, 8 h, 8 w, 3].

  Attributes:
    config: sizes.
    dtype: compute dtype.
  """

  config: architecture.AutoencoderConfig
  dtype: types.DType

  @nn.compact
  def __call__(self, z: Features) -> types.Pixels:
    """Returns the pixels of latent cells, about in [-1, 1]."""
    c = self.config
    widths = [c.channels * m for m in c.multipliers]
    in_width = widths[-1]
    x = _conv(in_width, self.dtype, name="conv_in")(z)
    middle = Middle(in_width, self.dtype, name="mid")
    x = middle(x)
    for i in reversed(range(len(widths))):
      level = Level(
        in_channels=in_width,
        channels=widths[i],
        num_blocks=c.num_res_blocks + 1,
        dtype=self.dtype,
        resample="upsample" if i > 0 else "",
        name=f"up_{i}",
      )
      x = level(x)
      in_width = widths[i]
    x = nn.silu(GroupNorm(self.dtype, name="norm_out")(x))
    return _conv(3, self.dtype, name="conv_out")(x)


class Autoencoder(nn.Module):
  """Deterministic autoencoder between pixels and the flow's latent tokens.

  Attributes:
    config: sizes.
    dtype: compute dtype.
    latent_patch: latent cells along a side of a token.
  """

  config: architecture.AutoencoderConfig
  dtype: types.DType = jnp.float32
  latent_patch: int = 2

  def setup(self):
    """Makes the submodules."""
    self.encoder = Encoder(self.config, self.dtype)
    self.decoder = Decoder(self.config, self.dtype)

  def __call__(self, pixels: types.Pixels) -> types.Pixels:
    """Returns the reconstruction (and, in `init`, makes all parameters)."""
    token_side = self.latent_patch * self.config.downsample
    _, height, width, _ = pixels.shape
    grid = (height // token_side, width // token_side)
    return self.decode(self.encode(pixels), grid)

  def moments(self, pixels: types.Pixels) -> Features:
    """Returns [B, h/8, w/8, 2 z]: posterior means, then log-variances, unscaled."""
    return self.encoder(pixels).astype(layers.at_least_float32(self.dtype))

  def encode(self, pixels: types.Pixels) -> types.Latent:
    """Returns the latent tokens of the posterior mean: scale * (mean - shift), cut into patches.

    Args:
      pixels: [B, h, w, 3] in [-1, 1]; sides are multiples of the pixels of a token (16).

    Returns:
      [B, N, C] tokens, row-major, float32 or wider; C is ordered (row in patch, column in patch,
      channel).
    """
    # The reference encodes without sampling: the variance is not read.
    moments = self.moments(pixels)
    mean, _ = jnp.split(moments, 2, axis=-1)
    latent = self.config.scale * (mean - self.config.shift)
    return layers.patchify(latent, self.latent_patch)

  def decode(self, latent: types.Latent, grid: tuple[int, int]) -> types.Pixels:
    """Returns the pixels of latent tokens.

    Args:
      latent: [B, N, C] tokens as `encode` makes them.
      grid: rows and columns of tokens.

    Returns:
      [B, h, w, 3] in float32 or wider, about in [-1, 1] but not clipped.
    """
    z = layers.unpatchify(latent, grid, self.latent_patch)
    unscaled = z / self.config.scale + self.config.shift
    pixels = self.decoder(unscaled)
    return pixels.astype(layers.at_least_float32(self.dtype))

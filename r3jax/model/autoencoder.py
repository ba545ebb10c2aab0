"""FLUX autoencoder, channels last: pixels <-> latent tokens (R3.md section 2).

Module names follow the released names: `encoder.down.0.block.1.conv1` is
`encoder/down_0/block_1/conv1`.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float

from r3jax import types
from r3jax.model import architecture
from r3jax.model import layers

Features = Float[Array, "B h w c"]

NUM_GROUPS = 32
NORM_EPS = 1e-6
SAME = ((1, 1), (1, 1))
BOTTOM_RIGHT = ((0, 1), (0, 1))  # the stride-2 convolutions pad only there


def _conv(features: int, dtype: types.DType, **kwargs) -> nn.Conv:
  settings = {"kernel_size": (3, 3), "padding": SAME} | kwargs
  kernel_axes = (None, None, "conv_in", "conv_out")
  return nn.Conv(
    features,
    dtype=dtype,
    kernel_init=nn.with_logical_partitioning(
      nn.initializers.lecun_normal(), kernel_axes
    ),
    bias_init=nn.with_logical_partitioning(
      nn.initializers.zeros, ("conv_out",)
    ),
    **settings,
  )


def _pointwise(features: int, dtype: types.DType) -> nn.Conv:
  return _conv(features, dtype, kernel_size=(1, 1), padding="VALID")


def _group_norm(dtype: types.DType, name: str | None = None) -> nn.GroupNorm:
  return nn.GroupNorm(
    NUM_GROUPS,
    name=name,
    epsilon=NORM_EPS,
    dtype=dtype,
    use_fast_variance=False,
    scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("norm",)),
    bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)),
  )


class ResBlock(nn.Module):
  """`x + conv(silu(norm(conv(silu(norm(x))))))`, with a 1x1 shortcut where the width changes."""

  in_channels: int
  channels: int
  dtype: types.DType

  def setup(self):
    self.norm1 = _group_norm(self.dtype)
    self.conv1 = _conv(self.channels, self.dtype)
    self.norm2 = _group_norm(self.dtype)
    self.conv2 = _conv(self.channels, self.dtype)
    if self.in_channels != self.channels:
      self.nin_shortcut = _pointwise(self.channels, self.dtype)

  def __call__(self, x: Features) -> Features:
    y = self.conv1(nn.silu(self.norm1(x)))
    y = self.conv2(nn.silu(self.norm2(y)))
    return y + (
      x if self.in_channels == self.channels else self.nin_shortcut(x)
    )


class Attention(nn.Module):
  """Residual single-head attention over all positions."""

  channels: int
  dtype: types.DType

  def setup(self):
    self.norm = _group_norm(self.dtype)
    self.q, self.k, self.v, self.proj_out = (
      _pointwise(self.channels, self.dtype) for _ in range(4)
    )

  def __call__(self, x: Features) -> Features:
    y = self.norm(x)
    tokens = (x.shape[0], -1, 1, self.channels)  # [B, h*w, one head, c]
    heads = (part(y).reshape(tokens) for part in (self.q, self.k, self.v))
    return x + self.proj_out(layers.full_attention(*heads).reshape(x.shape))


class Middle(nn.Module):
  """Residual block, attention, residual block at the deepest level."""

  channels: int
  dtype: types.DType

  def setup(self):
    self.block_1 = ResBlock(self.channels, self.channels, self.dtype)
    self.attn_1 = Attention(self.channels, self.dtype)
    self.block_2 = ResBlock(self.channels, self.channels, self.dtype)

  def __call__(self, x: Features) -> Features:
    return self.block_2(self.attn_1(self.block_1(x)))


class Resample(nn.Module):
  """The convolution of a change of resolution (a module of its own for its released name)."""

  channels: int
  stride: int
  # zeros (before, after) per side
  padding: tuple[tuple[int, int], tuple[int, int]]
  dtype: types.DType

  def setup(self):
    self.conv = _conv(
      self.channels, self.dtype, strides=self.stride, padding=self.padding
    )

  def __call__(self, x: Features) -> Features:
    return self.conv(x)


class Level(nn.Module):
  """The residual blocks of one level, then (if asked for) a change of resolution."""

  in_channels: int
  channels: int
  num_blocks: int
  dtype: types.DType
  resample: str = ""  # "downsample" halves the sides, "upsample" doubles them

  @nn.compact
  def __call__(self, x: Features) -> Features:
    for i in range(self.num_blocks):
      in_channels = self.in_channels if i == 0 else self.channels
      x = ResBlock(in_channels, self.channels, self.dtype, name=f"block_{i}")(x)
    if self.resample == "downsample":
      return Resample(
        self.channels, 2, BOTTOM_RIGHT, self.dtype, name=self.resample
      )(x)
    if self.resample == "upsample":
      x = x.repeat(2, axis=1).repeat(2, axis=2)  # nearest
      return Resample(self.channels, 1, SAME, self.dtype, name=self.resample)(x)
    return x


class Encoder(nn.Module):
  """[B, H, W, 3] pixels -> [B, h, w, 2 z] means and log-variances."""

  config: architecture.AutoencoderConfig
  dtype: types.DType

  @nn.compact
  def __call__(self, pixels: types.Pixels) -> Features:
    c = self.config
    widths = [c.channels * m for m in c.multipliers]
    x = _conv(c.channels, self.dtype, name="conv_in")(pixels)
    for i, (before, width) in enumerate(zip([c.channels] + widths, widths)):
      resample = "downsample" if i < len(widths) - 1 else ""
      x = Level(
        before, width, c.num_res_blocks, self.dtype, resample, name=f"down_{i}"
      )(x)
    x = Middle(widths[-1], self.dtype, name="mid")(x)
    x = nn.silu(_group_norm(self.dtype, name="norm_out")(x))
    return _conv(2 * c.latent_channels, self.dtype, name="conv_out")(x)


class Decoder(nn.Module):
  """[B, h, w, z] unscaled latents -> [B, H, W, 3] pixels."""

  config: architecture.AutoencoderConfig
  dtype: types.DType

  @nn.compact
  def __call__(self, z: Features) -> types.Pixels:
    c = self.config
    widths = [c.channels * m for m in c.multipliers]
    x = _conv(widths[-1], self.dtype, name="conv_in")(z)
    x = Middle(widths[-1], self.dtype, name="mid")(x)
    for i in reversed(range(len(widths))):
      before = widths[min(i + 1, len(widths) - 1)]
      resample = "upsample" if i > 0 else ""
      x = Level(
        before,
        widths[i],
        c.num_res_blocks + 1,
        self.dtype,
        resample,
        name=f"up_{i}",
      )(x)
    x = nn.silu(_group_norm(self.dtype, name="norm_out")(x))
    return _conv(3, self.dtype, name="conv_out")(x)


class Autoencoder(nn.Module):
  """Deterministic autoencoder between pixels and the flow's latent tokens."""

  config: architecture.AutoencoderConfig
  dtype: types.DType = jnp.float32
  latent_patch: int = 2  # latent cells per token side

  def setup(self):
    self.encoder = Encoder(self.config, self.dtype)
    self.decoder = Decoder(self.config, self.dtype)

  def __call__(self, pixels: types.Pixels) -> types.Pixels:
    """Returns the reconstruction (and, in `init`, makes all parameters)."""
    cell = self.latent_patch * self.config.downsample
    grid = (pixels.shape[1] // cell, pixels.shape[2] // cell)
    return self.decode(self.encode(pixels), grid)

  def moments(self, pixels: types.Pixels) -> Features:
    """Returns [B, H/8, W/8, 2 z]: posterior means, then log-variances, unscaled."""
    return self.encoder(pixels).astype(layers.at_least_float32(self.dtype))

  def encode(self, pixels: types.Pixels) -> types.Latent:
    """Returns the latent tokens of the posterior mean: `scale * (mean - shift)`, patchified.

    Args:
      pixels: [B, H, W, 3] in [-1, 1]; sides are multiples of the pixels of a token (16).

    Returns:
      [B, N, C] tokens, row-major, float32 or wider; C is ordered (row in patch, column in patch,
      channel).
    """
    mean, _ = jnp.split(self.moments(pixels), 2, axis=-1)
    return layers.patchify(
      self.config.scale * (mean - self.config.shift), self.latent_patch
    )

  def decode(self, latent: types.Latent, grid: tuple[int, int]) -> types.Pixels:
    """Returns [B, H, W, 3] pixels in float32 or wider, about in [-1, 1] but not clamped.

    Args:
      latent: [B, N, C] tokens as `encode` makes them.
      grid: tokens down and across.
    """
    z = layers.unpatchify(latent, grid, self.latent_patch)
    pixels = self.decoder(z / self.config.scale + self.config.shift)
    return pixels.astype(layers.at_least_float32(self.dtype))

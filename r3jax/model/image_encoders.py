"""The frozen image side of BAGEL: 8-bit images to ViT features and latents, and back."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from r3jax import types
from r3jax.model import architecture
from r3jax.model import autoencoder
from r3jax.model import layers
from r3jax.model import preprocess
from r3jax.model import siglip
from r3jax.parallel import sharding

_PIXELS_AT_ONCE = 512 * 512  # on a device; bounds the memory of activations


@dataclasses.dataclass(frozen=True)
class Towers:
  """ViT and autoencoder for images of one size; their parameters are arguments.

  Attributes:
    config: sizes of the model.
    size: height and width in pixels of the images that stages hand on.
    dtype: compute dtype.
    resize_order: which pass of a resize comes first, see `preprocess.ResizeOrder`.
  """

  config: architecture.BagelConfig
  size: tuple[int, int]
  dtype: types.DType = jnp.float32
  resize_order: preprocess.ResizeOrder = "width_first"

  @property
  def latent_grid(self) -> tuple[int, int]:
    """Rows and columns of latent tokens of an image."""
    return self._grid(
      self.config.autoencoder_transform, self.config.pixels_per_token
    )

  @property
  def vit_grid(self) -> tuple[int, int]:
    """Rows and columns of ViT patches of an image."""
    return self._grid(
      self.config.vision_transform, self.config.vision.patch_size
    )

  def _grid(
    self, transform: architecture.ImageTransform, cell: int
  ) -> tuple[int, int]:
    height, width = preprocess.target_size(*self.size, transform)
    if height % cell or width % cell:
      raise ValueError(
        f"resized sides must be multiples of {cell}; got {height}x{width}"
      )
    return height // cell, width // cell

  def _pixels(
    self, images: types.Images, transform: architecture.ImageTransform
  ) -> types.Pixels:
    """Returns resized images as pixels in [-1, 1], in the compute dtype."""
    size = preprocess.target_size(*self.size, transform)
    resized = preprocess.resize(images, size, self.resize_order)
    return preprocess.to_pixels(resized).astype(self.dtype)

  @jax.named_scope("towers")
  def features(self, frozen: types.Params, images: types.Images) -> jax.Array:
    """Returns the ViT features of 8-bit images.

    Args:
      frozen: {"vision", "autoencoder"} parameters.
      images: [B, h, w, 3] uint8 of the size of the towers.

    Returns:
      [B, N, vision hidden size] in the compute dtype.
    """
    vision = self.config.vision
    tower = siglip.VisionTransformer(vision, self.dtype)
    position_ids = layers.grid_positions(
      *self.vit_grid, vision.positions_per_side
    )

    def features_of_rows(params, images):
      pixels = self._pixels(images, self.config.vision_transform)
      patches = layers.patchify(pixels, vision.patch_size)
      return tower.apply({"params": params}, patches, position_ids)

    return self._over_rows(features_of_rows, frozen["vision"], images)

  @jax.named_scope("towers")
  def encode(self, frozen: types.Params, images: types.Images) -> types.Latent:
    """Returns the latent tokens of 8-bit images.

    Args:
      frozen: {"vision", "autoencoder"} parameters.
      images: [B, h, w, 3] uint8 of the size of the towers.

    Returns:
      [B, N, C] in float32 or wider.
    """

    def encode_rows(params, images):
      pixels = self._pixels(images, self.config.autoencoder_transform)
      return self._autoencoder().apply(
        {"params": params}, pixels, method="encode"
      )

    return self._over_rows(encode_rows, frozen["autoencoder"], images)

  @jax.named_scope("towers")
  def decode(
    self, frozen: types.Params, latent: types.Latent
  ) -> tuple[types.Images, types.Flags]:
    """Returns the 8-bit images of latent tokens.

    Args:
      frozen: {"vision", "autoencoder"} parameters.
      latent: [B, N, C].

    Returns:
      [B, h, w, 3] uint8, see `preprocess.to_uint8`; and [B] bool, whether every number that a row
      was made of is finite. 8 bits have no NaN, so that another image looks like a black one.
    """

    def decode_rows(params, latent):
      pixels = self._autoencoder().apply(
        {"params": params}, latent, self.latent_grid, method="decode"
      )
      pixels = jnp.asarray(pixels)
      is_finite = jnp.isfinite(pixels).all(axis=(1, 2, 3))
      # Pixels are clipped: one of an infinite latent may be finite again.
      is_finite &= jnp.isfinite(latent).all(axis=(1, 2))
      return preprocess.to_uint8(pixels), is_finite

    return self._over_rows(decode_rows, frozen["autoencoder"], latent)

  def _over_rows(
    self, function: Callable, params: types.Params, rows: jax.Array
  ) -> Any:
    """Maps a function over images, on every device as many at a time as make 512x512 pixels."""
    height, width = self.size
    at_once = max(1, _PIXELS_AT_ONCE // (height * width))
    return sharding.over_rows(function, params, rows, at_once)

  def _autoencoder(self) -> autoencoder.Autoencoder:
    return autoencoder.Autoencoder(
      self.config.autoencoder, self.dtype, self.config.latent_patch
    )

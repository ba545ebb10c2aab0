"""The frozen image side of BAGEL: 8-bit images to ViT features and latents, and back."""

import dataclasses

import jax
import jax.numpy as jnp

from r3jax import types
from r3jax.model import architecture
from r3jax.model import autoencoder
from r3jax.model import layers
from r3jax.model import preprocess
from r3jax.model import siglip
from r3jax.parallel import sharding


@dataclasses.dataclass(frozen=True)
class Towers:
  """ViT and autoencoder for images of one size.

  Attributes:
    config: sizes of the model.
    size: height and width in pixels of the images that go from stage to stage.
    dtype: compute dtype.
  """

  config: architecture.BagelConfig
  size: tuple[int, int]
  dtype: types.DType = jnp.float32

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
    size = preprocess.target_size(*self.size, transform)
    return preprocess.to_pixels(preprocess.resize(images, size)).astype(
      self.dtype
    )

  @jax.named_scope("towers")
  def features(self, frozen: types.Params, images: types.Images) -> jax.Array:
    """Returns the ViT features of 8-bit images, [B, N, vision hidden].

    Args:
      frozen: {"vision", "autoencoder"} parameters.
      images: [B, *size, 3] uint8.
    """
    vision = self.config.vision
    ids = layers.grid_positions(*self.vit_grid, vision.positions_per_side)
    tower = siglip.VisionTransformer(vision, self.dtype)

    def some(params, images):
      pixels = self._pixels(images, self.config.vision_transform)
      return tower.apply(
        {"params": params}, layers.patchify(pixels, vision.patch_size), ids
      )

    return sharding.over_rows(some, frozen["vision"], images, self._at_once)

  @jax.named_scope("towers")
  def encode(self, frozen: types.Params, images: types.Images) -> types.Latent:
    """Returns the latent tokens of 8-bit images, [B, N, C]."""

    def some(params, images):
      pixels = self._pixels(images, self.config.autoencoder_transform)
      return self._autoencoder().apply(
        {"params": params}, pixels, method="encode"
      )

    return sharding.over_rows(
      some, frozen["autoencoder"], images, self._at_once
    )

  @jax.named_scope("towers")
  def decode(self, frozen: types.Params, latent: types.Latent) -> types.Images:
    """Returns the 8-bit images of latent tokens, [B, *size, 3] (floor of value * 255)."""

    def some(params, latent):
      pixels = self._autoencoder().apply(
        {"params": params}, latent, self.latent_grid, method="decode"
      )
      return preprocess.to_uint8(pixels)

    return sharding.over_rows(
      some, frozen["autoencoder"], latent, self._at_once
    )

  @property
  def _at_once(self) -> int:
    """Images that a device handles at a time: one of 512x512 pixels, or as many smaller ones."""
    return max(1, 512 * 512 // (self.size[0] * self.size[1]))

  def _autoencoder(self) -> autoencoder.Autoencoder:
    return autoencoder.Autoencoder(
      self.config.autoencoder, self.dtype, self.config.latent_patch
    )

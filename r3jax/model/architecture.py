"""Sizes of a BAGEL model; `checkpoint/bagel_config.py` reads them from a folder."""

import dataclasses

from r3jax.sequence import protocol


@dataclasses.dataclass(frozen=True)
class LLMConfig:
  """Sizes of the Qwen2 mixture-of-transformers decoder (docs/algorithm.md#model).

  Attributes:
    hidden_size: D, width of the residual stream.
    intermediate_size: width of the MLP.
    num_layers: L.
    num_heads: H, query heads.
    num_kv_heads: K, key/value heads; divides H.
    vocab_size: V, rows of the embedding table, unused ids included.
    rope_theta: base of the rotary wavelengths.
    rms_norm_eps: added to mean squares.
  """

  hidden_size: int = 3584
  intermediate_size: int = 18944
  num_layers: int = 28
  num_heads: int = 28
  num_kv_heads: int = 4
  vocab_size: int = 152064
  rope_theta: float = 1e6
  rms_norm_eps: float = 1e-6

  @property
  def head_dim(self) -> int:
    """Width of one attention head."""
    return self.hidden_size // self.num_heads


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """Sizes of the SigLIP vision transformer.

  Attributes:
    hidden_size: width of a patch's features.
    intermediate_size: width of the MLP.
    num_layers: layers in use; the released weights lack SigLIP's last one.
    num_heads: attention heads.
    patch_size: pixels along a side of a patch.
    positions_per_side: rows and columns of the position table.
    layer_norm_eps: added to variances.
  """

  hidden_size: int = 1152
  intermediate_size: int = 4304
  num_layers: int = 26
  num_heads: int = 16
  patch_size: int = 14
  positions_per_side: int = 70
  layer_norm_eps: float = 1e-6


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
  """Sizes of the FLUX autoencoder.

  Attributes:
    channels: width of the first level.
    multipliers: width of every level in multiples of `channels`; all levels but the last halve the
      sides.
    num_res_blocks: residual blocks of an encoder level; a decoder level has one more.
    latent_channels: channels of a latent cell.
    scale: factor of the shifted latents.
    shift: subtracted from the latents.
  """

  channels: int = 128
  multipliers: tuple[int, ...] = (1, 2, 4, 4)
  num_res_blocks: int = 2
  latent_channels: int = 16
  scale: float = 0.3611
  shift: float = 0.1159

  @property
  def downsample(self) -> int:
    """Pixels along a side of a latent cell."""
    return 2 ** (len(self.multipliers) - 1)


@dataclasses.dataclass(frozen=True)
class ImageTransform:
  """Limits of the resize rule, see `preprocess.target_size`.

  Attributes:
    max_size: of the longest side, in pixels.
    min_size: of the shortest side, in pixels.
    stride: both sides become multiples of it.
  """

  max_size: int
  min_size: int
  stride: int


@dataclasses.dataclass(frozen=True)
class BagelConfig:
  """Everything about a BAGEL model that is not a parameter; the defaults are BAGEL-7B-MoT.

  Attributes:
    llm: sizes of the language model.
    vision: sizes of the ViT.
    autoencoder: sizes of the autoencoder.
    special_ids: token ids of the markers.
    latent_patch: latent cells along a side of a latent token.
    max_latent_side: rows and columns of the position table of latent tokens.
    max_patches_per_side: rows and columns of the position table behind the connector.
    autoencoder_transform: resize rule of images for the autoencoder.
    vision_transform: resize rule of images for the ViT.
  """

  llm: LLMConfig = LLMConfig()
  vision: VisionConfig = VisionConfig()
  autoencoder: AutoencoderConfig = AutoencoderConfig()
  special_ids: protocol.SpecialIds = protocol.SpecialIds()
  latent_patch: int = 2
  max_latent_side: int = 64
  max_patches_per_side: int = 70
  autoencoder_transform: ImageTransform = ImageTransform(512, 256, 16)
  vision_transform: ImageTransform = ImageTransform(504, 252, 14)

  @property
  def latent_dim(self) -> int:
    """C, numbers of a latent token."""
    return self.latent_patch**2 * self.autoencoder.latent_channels

  @property
  def pixels_per_token(self) -> int:
    """Pixels along a side of a latent token."""
    return self.latent_patch * self.autoencoder.downsample


def bagel_7b() -> BagelConfig:
  """Returns the released BAGEL-7B-MoT sizes."""
  return BagelConfig()

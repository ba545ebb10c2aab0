"""Sizes of a BAGEL model, read from its folder or taken from a preset."""

import dataclasses

from r3jax.sequence import protocol

# in a model's folder; the last may be missing
FILES = ("llm_config.json", "vit_config.json", "constants.json")
_SELECT_LAYER = -2  # a ViT config counts one layer more than is used


@dataclasses.dataclass(frozen=True)
class LLMConfig:
  """Qwen2 mixture-of-transformers decoder (R3.md section 2)."""

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
  """SigLIP tower; `num_layers` counts the layers in use (the released file drops the last)."""

  hidden_size: int = 1152
  intermediate_size: int = 4304
  num_layers: int = 26
  num_heads: int = 16
  patch_size: int = 14
  positions_per_side: int = 70
  layer_norm_eps: float = 1e-6


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
  """FLUX autoencoder; the number of levels sets the downsampling (2 per level but the last)."""

  channels: int = 128
  multipliers: tuple[int, ...] = (1, 2, 4, 4)
  num_res_blocks: int = 2
  latent_channels: int = 16
  scale: float = 0.3611
  shift: float = 0.1159

  @property
  def downsample(self) -> int:
    """Pixels per latent cell along one side."""
    return 2 ** (len(self.multipliers) - 1)


@dataclasses.dataclass(frozen=True)
class ImageTransform:
  """Resize rule: longest side <= max_size, shortest >= min_size, multiples of stride."""

  max_size: int
  min_size: int
  stride: int


@dataclasses.dataclass(frozen=True)
class BagelConfig:
  """Everything about a BAGEL model that is not a parameter; defaults are BAGEL-7B-MoT."""

  llm: LLMConfig = LLMConfig()
  vision: VisionConfig = VisionConfig()
  autoencoder: AutoencoderConfig = AutoencoderConfig()
  special_ids: protocol.SpecialIds = protocol.SpecialIds()
  latent_patch: int = 2  # latent cells per token side
  max_latent_side: int = 64  # side of the latent position table
  # side of the ViT position table after the connector
  max_patches_per_side: int = 70
  autoencoder_transform: ImageTransform = ImageTransform(512, 256, 16)
  vision_transform: ImageTransform = ImageTransform(504, 252, 14)

  @property
  def latent_dim(self) -> int:
    """Numbers per latent token."""
    return self.latent_patch**2 * self.autoencoder.latent_channels

  @property
  def pixels_per_token(self) -> int:
    """Pixels that one latent token covers along a side."""
    return self.latent_patch * self.autoencoder.downsample


def bagel_7b() -> BagelConfig:
  """Returns the released BAGEL-7B-MoT sizes."""
  return BagelConfig()

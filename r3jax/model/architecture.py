"""Sizes of a BAGEL model, read from its folder or taken from a preset."""

from collections.abc import Callable
import dataclasses
import json
from typing import Any

from etils import epath

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


def _from_json(path: epath.Path, make: Callable[[dict], Any]) -> Any:
  """Returns what `make` makes of a JSON file; ValueError if it is missing, no JSON or lacks a key."""
  if not path.exists():
    raise ValueError(f"a BAGEL folder must hold {path.name}; not found: {path}")
  try:
    return make(json.loads(path.read_text()))
  except json.JSONDecodeError as error:
    raise ValueError(f"{path} must be JSON: {error}") from error
  except KeyError as error:
    raise ValueError(f"{path} must have the key {error}") from error
  except TypeError as error:  # a list for an object, an unknown special token
    raise ValueError(f"{path} must hold a model's sizes: {error}") from error


def _llm_from_json(raw: dict) -> LLMConfig:
  return LLMConfig(
    hidden_size=raw["hidden_size"],
    intermediate_size=raw["intermediate_size"],
    num_layers=raw["num_hidden_layers"],
    num_heads=raw["num_attention_heads"],
    num_kv_heads=raw["num_key_value_heads"],
    vocab_size=raw["vocab_size"],
    rope_theta=raw["rope_theta"],
    rms_norm_eps=raw["rms_norm_eps"],
  )


def _vision_from_json(raw: dict, select_layer: int) -> VisionConfig:
  return VisionConfig(
    hidden_size=raw["hidden_size"],
    intermediate_size=raw["intermediate_size"],
    num_layers=raw["num_hidden_layers"] + 1 + select_layer,
    num_heads=raw["num_attention_heads"],
    patch_size=raw["patch_size"],
    positions_per_side=raw["image_size"] // raw["patch_size"],
    layer_norm_eps=raw.get("layer_norm_eps", 1e-6),
  )


def _transform_from_json(raw: dict) -> ImageTransform:
  return ImageTransform(raw["max"], raw["min"], raw["stride"])


def from_folder(folder: epath.PathLike) -> BagelConfig:
  """Reads `llm_config.json`, `vit_config.json` and, where present, `constants.json`.

  A released BAGEL folder has no `constants.json`; its constants are the defaults here.

  Args:
    folder: a folder in BAGEL's format.

  Returns:
    The sizes of the model in it.

  Raises:
    ValueError: a config file is missing, is not JSON or lacks a key.
  """
  folder = epath.Path(folder)
  llm = _from_json(folder / "llm_config.json", _llm_from_json)
  vision = lambda layer: _from_json(
    folder / "vit_config.json", lambda raw: _vision_from_json(raw, layer)
  )
  if not (folder / "constants.json").exists():
    return BagelConfig(llm=llm, vision=vision(_SELECT_LAYER))
  constants = lambda raw: _with_constants(
    raw, llm, vision(raw["vit_select_layer"])
  )
  return _from_json(folder / "constants.json", constants)


def _with_constants(
  raw: dict, llm: LLMConfig, vision: VisionConfig
) -> BagelConfig:
  vae = raw["vae"]
  return BagelConfig(
    llm=llm,
    vision=vision,
    autoencoder=AutoencoderConfig(
      channels=vae["ch"],
      multipliers=tuple(vae["ch_mult"]),
      num_res_blocks=vae["num_res_blocks"],
      latent_channels=vae["z_channels"],
      scale=vae["scale_factor"],
      shift=vae["shift_factor"],
    ),
    special_ids=protocol.SpecialIds(**raw["special_ids"]),
    latent_patch=raw["latent_patch_size"],
    max_latent_side=raw["max_latent_size"],
    max_patches_per_side=raw["vit_max_num_patch_per_side"],
    autoencoder_transform=_transform_from_json(raw["vae_transform"]),
    vision_transform=_transform_from_json(raw["vit_transform"]),
  )


def to_json(config: BagelConfig) -> dict[str, dict]:
  """Returns the contents of the JSON files by name; `from_folder` reads them back."""
  return {
    "llm_config.json": _llm_json(config),
    "vit_config.json": _vision_json(config.vision),
    "constants.json": _constants_json(config),
  }


def _llm_json(config: BagelConfig) -> dict:
  llm, ids = config.llm, config.special_ids
  return {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": ids.text_begin,
    "eos_token_id": ids.text_end,
    "hidden_size": llm.hidden_size,
    "intermediate_size": llm.intermediate_size,
    "num_hidden_layers": llm.num_layers,
    "num_attention_heads": llm.num_heads,
    "num_key_value_heads": llm.num_kv_heads,
    "vocab_size": llm.vocab_size,
    "rope_theta": llm.rope_theta,
    "rms_norm_eps": llm.rms_norm_eps,
  }


def _vision_json(vision: VisionConfig) -> dict:
  return {
    "model_type": "siglip_vision_model",
    "hidden_act": "gelu_pytorch_tanh",
    "num_channels": 3,
    "hidden_size": vision.hidden_size,
    "intermediate_size": vision.intermediate_size,
    "num_hidden_layers": vision.num_layers - 1 - _SELECT_LAYER,
    "num_attention_heads": vision.num_heads,
    "patch_size": vision.patch_size,
    "image_size": vision.patch_size * vision.positions_per_side,
    "layer_norm_eps": vision.layer_norm_eps,
  }


def _transform_json(transform: ImageTransform) -> dict:
  return {
    "max": transform.max_size,
    "min": transform.min_size,
    "stride": transform.stride,
  }


def _constants_json(config: BagelConfig) -> dict:
  vae = config.autoencoder
  return {
    "special_ids": dataclasses.asdict(config.special_ids),
    "latent_patch_size": config.latent_patch,
    "vae": {
      "downsample": vae.downsample,
      "in_channels": 3,
      "out_channels": 3,
      "ch": vae.channels,
      "ch_mult": list(vae.multipliers),
      "num_res_blocks": vae.num_res_blocks,
      "z_channels": vae.latent_channels,
      "scale_factor": vae.scale,
      "shift_factor": vae.shift,
    },
    "vit_select_layer": _SELECT_LAYER,
    "qk_norm": True,
    "max_latent_size": config.max_latent_side,
    "vit_max_num_patch_per_side": config.max_patches_per_side,
    "vae_transform": _transform_json(config.autoencoder_transform),
    "vit_transform": _transform_json(config.vision_transform),
  }

"""The JSON files of a BAGEL folder that give the sizes of its model."""

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses

from etils import epath

from r3jax.files import bounded
from r3jax.files import paths
from r3jax.files import rules
from r3jax.model import architecture
from r3jax.sequence import protocol

LLM_FILE = "llm_config.json"
VISION_FILE = "vit_config.json"
CONSTANTS_FILE = "constants.json"  # a released folder has none
FILES = (LLM_FILE, VISION_FILE, CONSTANTS_FILE)

# BAGEL reads the features of the last ViT layer but one, and counts layers as Hugging Face does.
_SELECTED_VISION_LAYER = -2

# What the sizes of a model may be: far beyond any that fits a machine, and small enough that a list
# of its tensors does.
_LAYERS = rules.Whole(1, 1000)
_HEADS = rules.Whole(1, 4096)
_WIDTH = rules.Whole(1, 2**22)
_SIDE = rules.Whole(1, 2**16)
_EPSILON = rules.Real(0, 1)
_TOKEN_ID = rules.Whole(0, 2**24)
_LLM_RULES = {
  "hidden_size": _WIDTH,
  "intermediate_size": _WIDTH,
  "num_hidden_layers": _LAYERS,
  "num_attention_heads": _HEADS,
  "num_key_value_heads": _HEADS,
  "vocab_size": rules.Whole(1, 2**24),
  "rope_theta": rules.Real(1, 1e12),
  "rms_norm_eps": _EPSILON,
}
_VISION_RULES = {
  "hidden_size": _WIDTH,
  "intermediate_size": _WIDTH,
  "num_hidden_layers": _LAYERS,
  "num_attention_heads": _HEADS,
  "patch_size": _SIDE,
  "image_size": _SIDE,
  "layer_norm_eps": _EPSILON,
}
_CONSTANTS_RULES = {
  "vit_select_layer": rules.Whole(-1000, -1),
  "latent_patch_size": rules.Whole(1, 64),
  "max_latent_size": rules.Whole(1, 4096),
  "vit_max_num_patch_per_side": rules.Whole(1, 4096),
  "vae.ch": _WIDTH,
  "vae.ch_mult": rules.Several(rules.Whole(1, 64)),
  "vae.num_res_blocks": rules.Whole(0, 100),
  "vae.z_channels": rules.Whole(1, 4096),
  "vae.scale_factor": rules.Real(-1e6, 1e6),
  "vae.shift_factor": rules.Real(-1e6, 1e6),
  "vae_transform.max": _SIDE,
  "vae_transform.min": _SIDE,
  "vae_transform.stride": _SIDE,
  "vit_transform.max": _SIDE,
  "vit_transform.min": _SIDE,
  "vit_transform.stride": _SIDE,
  "special_ids.text_begin": _TOKEN_ID,
  "special_ids.text_end": _TOKEN_ID,
  "special_ids.image_begin": _TOKEN_ID,
  "special_ids.image_end": _TOKEN_ID,
}
_RULES = {
  LLM_FILE: _LLM_RULES,
  VISION_FILE: _VISION_RULES,
  CONSTANTS_FILE: _CONSTANTS_RULES,
}


def load(folder: epath.PathLike) -> architecture.BagelConfig:
  """Reads the sizes of the model in a BAGEL folder.

  Without `constants.json` (as in a released folder) the constants are the defaults of
  `BagelConfig`.

  Args:
    folder: a folder in BAGEL's format, on a disk or in a bucket.

  Returns:
    The sizes of the model.

  Raises:
    ValueError: a file is missing, is not JSON, lacks a key, holds something else, or has sizes that
      no model has.
  """
  folder = epath.Path(folder)
  with _json_object(folder / LLM_FILE) as raw:
    llm = _llm_from_json(raw)

  constants_path = folder / CONSTANTS_FILE
  if not constants_path.exists():
    with _json_object(folder / VISION_FILE) as raw:
      vision = _vision_from_json(raw, _SELECTED_VISION_LAYER)
    return architecture.BagelConfig(llm=llm, vision=vision)

  with _json_object(constants_path) as constants:
    selected_layer = constants["vit_select_layer"]
    with _json_object(folder / VISION_FILE) as raw:
      vision = _vision_from_json(raw, selected_layer)
    return _with_constants(constants, llm, vision)


def to_json(config: architecture.BagelConfig) -> dict[str, dict]:
  """Returns the contents of the JSON files by file name; `load` reads them back."""
  return {
    LLM_FILE: _llm_json(config),
    VISION_FILE: _vision_json(config.vision),
    CONSTANTS_FILE: _constants_json(config),
  }


@contextlib.contextmanager
def _json_object(path: epath.Path) -> Iterator[dict]:
  """Yields the object in one of `FILES`; errors of the block that reads it name the file."""
  if not path.exists():
    if not path.parent.exists():
      raise ValueError(
        f"a model must be in a folder that exists; not found: {path.parent}"
        f"{paths.did_you_mean(path.parent)}"
      )
    raise ValueError(f"a BAGEL folder must hold {path.name}; not found: {path}")
  bounded.check_link(path)
  raw = bounded.read_json(path)
  if not isinstance(raw, dict):
    raise ValueError(
      f"{path} must hold a model's sizes: it holds a {type(raw).__name__}"
    )
  problems = _size_problems(raw, _RULES[path.name])
  if problems:
    raise ValueError(f"{path} must hold a model's sizes: {'; '.join(problems)}")
  try:
    yield raw
  except KeyError as error:
    raise ValueError(f"{path} must have the key {error}") from error
  except (TypeError, ValueError) as error:  # an unknown special token, ...
    raise ValueError(f"{path} must hold a model's sizes: {error}") from error


def _size_problems(
  raw: dict, rule_of_key: Mapping[str, rules.Rule]
) -> list[str]:
  """Returns a text for every size that breaks its rule; missing ones are left to the reader."""
  problems = []
  for key, rule in rule_of_key.items():
    section, _, name = key.rpartition(".")
    values = raw.get(section) if section else raw
    if values is None:
      continue
    if not isinstance(values, dict):
      problems.append(f"{section} must be an object")
    elif name in values:
      problems.append(rules.problem(key, rule, values[name]))
  return list(dict.fromkeys(filter(None, problems)))


def _divides(name: str, divisor: int, whole_name: str, whole: int) -> None:
  """Raises a ValueError unless one size divides another."""
  if whole % divisor:
    raise ValueError(
      f"{name} must divide {whole_name}; got {divisor} and {whole}"
    )


def _llm_from_json(raw: dict) -> architecture.LLMConfig:
  heads = raw["num_attention_heads"]
  kv_heads = raw["num_key_value_heads"]
  hidden_size = raw["hidden_size"]
  _divides("num_attention_heads", heads, "hidden_size", hidden_size)
  _divides("num_key_value_heads", kv_heads, "num_attention_heads", heads)
  return architecture.LLMConfig(
    hidden_size=hidden_size,
    intermediate_size=raw["intermediate_size"],
    num_layers=raw["num_hidden_layers"],
    num_heads=heads,
    num_kv_heads=kv_heads,
    vocab_size=raw["vocab_size"],
    rope_theta=raw["rope_theta"],
    rms_norm_eps=raw["rms_norm_eps"],
  )


def _vision_from_json(
  raw: dict, selected_layer: int
) -> architecture.VisionConfig:
  heads = raw["num_attention_heads"]
  hidden_size = raw["hidden_size"]
  _divides("num_attention_heads", heads, "hidden_size", hidden_size)
  patch_size = raw["patch_size"]
  positions_per_side = raw["image_size"] // patch_size
  # counted from the end: -1 selects the last layer, -2 the one before
  num_layers = raw["num_hidden_layers"] + 1 + selected_layer
  if num_layers < 1 or positions_per_side < 1:
    raise ValueError(
      f"at least one layer and one patch must be in use; got {num_layers} layers, "
      f"{positions_per_side} patches a side"
    )
  return architecture.VisionConfig(
    hidden_size=hidden_size,
    intermediate_size=raw["intermediate_size"],
    num_layers=num_layers,
    num_heads=heads,
    patch_size=patch_size,
    positions_per_side=positions_per_side,
    layer_norm_eps=raw.get("layer_norm_eps", 1e-6),
  )


def _transform_from_json(raw: dict) -> architecture.ImageTransform:
  transform = architecture.ImageTransform(
    max_size=raw["max"], min_size=raw["min"], stride=raw["stride"]
  )
  if not transform.stride <= transform.min_size <= transform.max_size:
    raise ValueError(f"a transform must have stride <= min <= max; got {raw}")
  return transform


def _with_constants(
  raw: dict, llm: architecture.LLMConfig, vision: architecture.VisionConfig
) -> architecture.BagelConfig:
  vae = raw["vae"]
  num_levels = len(vae["ch_mult"])
  if not 1 <= num_levels <= 8:
    raise ValueError(f"vae.ch_mult must have 1 to 8 levels; got {num_levels}")
  if not vae["scale_factor"]:
    raise ValueError("vae.scale_factor must not be 0")
  return architecture.BagelConfig(
    llm=llm,
    vision=vision,
    autoencoder=architecture.AutoencoderConfig(
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


def _llm_json(config: architecture.BagelConfig) -> dict:
  llm = config.llm
  special_ids = config.special_ids
  return {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": special_ids.text_begin,
    "eos_token_id": special_ids.text_end,
    "hidden_size": llm.hidden_size,
    "intermediate_size": llm.intermediate_size,
    "num_hidden_layers": llm.num_layers,
    "num_attention_heads": llm.num_heads,
    "num_key_value_heads": llm.num_kv_heads,
    "vocab_size": llm.vocab_size,
    "rope_theta": llm.rope_theta,
    "rms_norm_eps": llm.rms_norm_eps,
  }


def _vision_json(vision: architecture.VisionConfig) -> dict:
  return {
    "model_type": "siglip_vision_model",
    "hidden_act": "gelu_pytorch_tanh",
    "num_channels": 3,
    "hidden_size": vision.hidden_size,
    "intermediate_size": vision.intermediate_size,
    "num_hidden_layers": vision.num_layers - 1 - _SELECTED_VISION_LAYER,
    "num_attention_heads": vision.num_heads,
    "patch_size": vision.patch_size,
    "image_size": vision.patch_size * vision.positions_per_side,
    "layer_norm_eps": vision.layer_norm_eps,
  }


def _transform_json(transform: architecture.ImageTransform) -> dict:
  return {
    "max": transform.max_size,
    "min": transform.min_size,
    "stride": transform.stride,
  }


def _constants_json(config: architecture.BagelConfig) -> dict:
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
    "vit_select_layer": _SELECTED_VISION_LAYER,
    "qk_norm": True,
    "max_latent_size": config.max_latent_side,
    "vit_max_num_patch_per_side": config.max_patches_per_side,
    "vae_transform": _transform_json(config.autoencoder_transform),
    "vit_transform": _transform_json(config.vision_transform),
  }

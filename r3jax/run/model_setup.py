"""Builds the model of a config: its folder, its modules and how it samples; reads no weights."""

from collections.abc import Sequence
import dataclasses

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from r3jax.agent import actors
from r3jax.agent import rollout_settings
from r3jax.checkpoint import bagel_config
from r3jax.checkpoint import pretrained as pretrained_lib
from r3jax.model import architecture
from r3jax.model import image_encoders
from r3jax.model import low_rank
from r3jax.model import network
from r3jax.model import preprocess
from r3jax.parallel import sharding
from r3jax.run import stage_settings
from r3jax.worlds import base as worlds_base
from r3jax.worlds import registry

DTYPES = {
  "float32": jnp.float32,
  "bfloat16": jnp.bfloat16,
  "float64": jnp.float64,
}


@dataclasses.dataclass(frozen=True)
class ModelSetup:
  """The model of a config, and how it samples.

  Attributes:
    world: World of the config; None if it names none.
    pretrained: Folder of the model: weights and tokenizer.
    modules: The model without its parameters.
    rollout: How it samples in training.
  """

  world: worlds_base.World | None
  pretrained: pretrained_lib.Pretrained
  modules: actors.Modules
  rollout: rollout_settings.RolloutSettings

  def segments(
    self, texts: Sequence[str], capacity: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """Encodes texts as segments of the same capacity.

    Returns:
      Token ids int32 [B, capacity] and lengths int32 [B].

    Raises:
      ValueError: A text does not fit, or has unknown words.
    """
    ids = []
    lengths = []
    for text in texts:
      segment, length = self.pretrained.tokenizer.segment(text, capacity)
      ids.append(segment)
      lengths.append(length)
    return np.stack(ids), np.array(lengths, np.int32)

  def decode(self, ids: np.ndarray, lengths: np.ndarray) -> list[str]:
    """Decodes segments, without their begin and end.

    Args:
      ids: Token ids [B, T].
      lengths: Lengths [B], begin and end included.

    Returns:
      One text per segment.
    """
    tokenizer = self.pretrained.tokenizer
    texts = []
    for row, length in zip(np.asarray(ids), np.asarray(lengths), strict=True):
      texts.append(tokenizer.decode(row[1 : length - 1].tolist()))
    return texts


def build(config: ml_collections.ConfigDict) -> ModelSetup:
  """Checks the parts of a config that describe the model and its sampling, and builds them.

  Raises:
    ValueError: The config cannot be used; the message has what must hold, and what was given.
  """
  if config.model.dtype not in DTYPES:
    raise ValueError(
      f"model.dtype must be one of {sorted(DTYPES)}; got {config.model.dtype!r}"
    )
  dtype = DTYPES[config.model.dtype]
  pretrained = pretrained_lib.find(config.model.folder, config.world)
  size = (config.image.height, config.image.width)
  accepted_size = preprocess.target_size(
    *size, pretrained.sizes.autoencoder_transform
  )
  if accepted_size != size:
    limits = pretrained.sizes.autoencoder_transform
    height, width = accepted_size
    raise ValueError(
      "image.height and image.width must be a size that the model keeps: multiples of "
      f"{limits.stride} from {limits.min_size} to {limits.max_size} "
      f"({bagel_config.CONSTANTS_FILE} of the model, vae_transform: stride, min, max); it makes "
      f"{height} x {width} of {size[0]} x {size[1]} (set image.height={height} and "
      f"image.width={width})"
    )
  towers = image_encoders.Towers(pretrained.sizes, size, dtype)
  return ModelSetup(
    world=registry.find_if_named(config.world),
    pretrained=pretrained,
    modules=make_modules(config, pretrained.sizes, towers),
    rollout=stage_settings.for_rollouts(config, pretrained.tokenizer, towers),
  )


def make_modules(
  config: ml_collections.ConfigDict,
  sizes: architecture.BagelConfig,
  towers: image_encoders.Towers,
) -> actors.Modules:
  """Returns the model without its parameters.

  Args:
    config: Its sections model, sharding and optimizer are read.
    sizes: Sizes of the model.
    towers: Frozen half of the model.

  Raises:
    ValueError: The config cannot be used.
  """
  rules = sharding.Rules.of(config.sharding.train.to_dict())
  rollout_rules = sharding.Rules.of(config.sharding.rollout.to_dict())
  bagel = network.Bagel(
    sizes,
    towers.dtype,
    config.model.remat,
    _attention(config.model.attention, sizes.llm.head_dim),
    rules,
    _lora(config, sizes),
  )
  return actors.Modules(bagel, towers, rollout_rules)


def attention_on(platform: str, head_dim: int) -> str:
  """Returns the attention implementation of a platform, see `network.Bagel`.

  The TPU kernel requires a head width that is a multiple of 128.
  """
  if platform == "tpu" and head_dim % 128 == 0:
    return "splash"
  if platform == "cpu":
    return "by_head"
  return "xla"


def _attention(name: str, head_dim: int) -> str:
  """Checks the attention implementation of a config, and chooses one for "auto"."""
  if name not in ("auto", "by_head", "splash", "xla"):
    raise ValueError(
      "model.attention must be 'auto', 'by_head', 'splash' or 'xla'; "
      f"got {name!r}"
    )
  if name == "splash" and attention_on("tpu", head_dim) != "splash":
    raise ValueError(
      "model.attention 'splash' needs heads whose width is a multiple of 128; "
      f"the model's are {head_dim}"
    )
  if name == "auto":
    return attention_on(jax.default_backend(), head_dim)
  return name


def _lora(
  config: ml_collections.ConfigDict, sizes: architecture.BagelConfig
) -> low_rank.LoRA:
  """Returns the checked settings of the adapters."""
  lora = low_rank.LoRA(**config.model.lora)
  lora.check(sizes.llm)
  if lora.rank and lora.und and config.optimizer.freeze_und:
    raise ValueError(
      "model.lora.und must be () where optimizer.freeze_und is set, which keeps it; "
      f"got {lora.und}"
    )
  return lora

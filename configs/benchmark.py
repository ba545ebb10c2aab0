"""What `r3jax benchmark` measures: one iteration of a model with random weights.

  python launch/benchmark.py --config=configs/benchmark.py:peer --json=FILE

`:peer` is small enough for two CPU cores, and was chosen to compare r3jax with the public PyTorch
implementation side by side. `:1b` is a mixture of transformers with 1.3 billion parameters in
bfloat16, for one accelerator. `:7b-lora` has the sizes of BAGEL-7B-MoT and trains adapters, for one
accelerator of 80 GB or more.

All other keys are those of `r3_geneval.py`. Prompts fill their slots, and texts never end early, so
that the work does not depend on the weights.
"""

import ml_collections

from configs import r3_geneval

ConfigDict = ml_collections.ConfigDict


def _set_sizes(config: ConfigDict):
  """Sets the sizes of the model; those of BAGEL-7B-MoT."""
  sizes = config.sizes = ConfigDict()
  # The language model.
  sizes.hidden_size = 3584
  sizes.intermediate_size = 18944
  sizes.num_layers = 28
  sizes.num_heads = 28
  sizes.num_kv_heads = 4
  sizes.vocab_size = 152064
  # The ViT.
  sizes.vision_hidden_size = 1152
  sizes.vision_intermediate_size = 4304
  sizes.vision_num_layers = 26
  sizes.vision_num_heads = 16
  # The autoencoder.
  sizes.autoencoder_channels = 128  # of the first level
  sizes.autoencoder_multipliers = (1, 2, 4, 4)
  # Of an encoder level; a decoder level has one more.
  sizes.autoencoder_blocks = 2


def _set_benchmark(config: ConfigDict):
  """Sets how often everything runs."""
  benchmark = config.benchmark = ConfigDict()
  benchmark.warmup = 1  # runs of a program before those that are timed
  benchmark.repeats = 3  # timed runs of a program; the table has their medians


def _use_peer(config: ConfigDict):
  """Changes the config to the sizes that were compared with the PyTorch implementation."""
  config.sizes.update(
    hidden_size=512,
    intermediate_size=1536,
    num_layers=8,
    num_heads=8,
    num_kv_heads=4,
    vocab_size=8192,
    vision_hidden_size=256,
    vision_intermediate_size=1024,
    vision_num_layers=6,
    vision_num_heads=4,
    autoencoder_channels=32,
    autoencoder_blocks=1,
  )
  config.group_size = 4
  config.image.height = 256
  config.image.width = 256
  config.sequence.prompt_tokens = 24
  config.sequence.thought_tokens = 64
  config.sequence.question_tokens = 60
  config.sequence.answer_tokens = 96
  config.sequence.instruction_tokens = 16
  config.model.dtype = "float32"
  config.model.remat = "none"


def _use_1b(config: ConfigDict):
  """Changes the config to 1.3 billion parameters in the two experts."""
  config.sizes.update(
    hidden_size=1536,
    intermediate_size=4864,
    num_layers=22,
    num_heads=12,
    num_kv_heads=2,
    vocab_size=32768,
    vision_hidden_size=768,
    vision_intermediate_size=3072,
    vision_num_layers=12,
    vision_num_heads=12,
  )
  config.group_size = 16
  config.step.micro_batches = 4


def _use_7b_lora(config: ConfigDict):
  """Changes the config to adapters of BAGEL-7B-MoT."""
  config.model.lora.rank = 16
  config.group_size = 8
  config.step.micro_batches = 8


_VARIANTS = {"peer": _use_peer, "1b": _use_1b, "7b-lora": _use_7b_lora}


def get_config(variant: str = "peer") -> ConfigDict:
  """Returns the config of a variant: "peer", "1b" or "7b-lora".

  Raises:
    ValueError: there is no such variant.
  """
  if variant not in _VARIANTS:
    raise ValueError(
      f"the config's variant must be one of {sorted(_VARIANTS)}; got {variant!r}"
    )
  config = r3_geneval.get_config().unlock()
  _set_sizes(config)
  _set_benchmark(config)
  config.groups_per_step = 1
  config.loss.text_kl = 0.0  # without the pass of the reference policy
  config.loss.image_kl = 0.0
  config.mesh.data = 1
  _VARIANTS[variant](config)
  return config.lock()

"""What every key of `configs/benchmark.py` may be, as `r3jax/run/config_rules.py` for R3."""

import math

import ml_collections

from r3jax.files import rules
from r3jax.model import architecture
from r3jax.model import autoencoder
from r3jax.run import config_rules

_WIDTH = rules.Whole(1, 65_536)
_NUMBER = rules.Whole(1, 1_000)
# Levels of the autoencoder, each of which but the last halves the sides; a token has two cells.
_LEVELS = len(architecture.AutoencoderConfig().multipliers)
# Pixels along a side of a latent token, whatever the sizes are.
TOKEN_SIDE = architecture.BagelConfig().pixels_per_token

RULES: dict[str, rules.Rule] = config_rules.RULES | {
  "sizes.hidden_size": _WIDTH,
  "sizes.intermediate_size": _WIDTH,
  "sizes.num_layers": _NUMBER,
  "sizes.num_heads": _NUMBER,
  "sizes.num_kv_heads": _NUMBER,
  # The four markers, and a token beside them.
  "sizes.vocab_size": rules.Whole(5, 10_000_000),
  "sizes.vision_hidden_size": _WIDTH,
  "sizes.vision_intermediate_size": _WIDTH,
  "sizes.vision_num_layers": _NUMBER,
  "sizes.vision_num_heads": _NUMBER,
  "sizes.autoencoder_channels": _WIDTH,
  "sizes.autoencoder_multipliers": rules.Several(rules.Whole(1, 64)),
  "sizes.autoencoder_blocks": _NUMBER,
  "benchmark.warmup": rules.Whole(0, 1_000),
  "benchmark.repeats": rules.Whole(1, 1_000),
}


def check(config: ml_collections.ConfigDict) -> None:
  """Checks every value of a benchmark's config, and how the sizes go together.

  Raises:
    ValueError: values break their rules; the message has a line for each.
  """
  lines = rules.problems(config, RULES)
  if not lines:
    lines = [*_relations_of_sizes(config.sizes), *_relations_of_run(config)]
  if lines:
    raise ValueError("\n".join(lines))


def _relations_of_sizes(sizes: ml_collections.ConfigDict) -> list[str]:
  """Returns a line for every relation between sizes that does not hold."""
  lines = []
  # RoPE halves heads, and position tables quarter the width.
  if sizes.hidden_size % math.lcm(4, 2 * sizes.num_heads):
    lines.append(
      "sizes.hidden_size must be divisible by 4 and by 2 * sizes.num_heads; "
      f"got {sizes.hidden_size} and {sizes.num_heads} heads"
    )
  if sizes.num_heads % sizes.num_kv_heads:
    lines.append(
      "sizes.num_heads must be divisible by sizes.num_kv_heads; "
      f"got {sizes.num_heads} and {sizes.num_kv_heads}"
    )
  if sizes.vision_hidden_size % sizes.vision_num_heads:
    lines.append(
      "sizes.vision_hidden_size must be divisible by sizes.vision_num_heads; "
      f"got {sizes.vision_hidden_size} and {sizes.vision_num_heads}"
    )
  if sizes.autoencoder_channels % autoencoder.NUM_GROUPS:
    lines.append(
      f"sizes.autoencoder_channels must be divisible by {autoencoder.NUM_GROUPS}; "
      f"got {sizes.autoencoder_channels}"
    )
  if len(sizes.autoencoder_multipliers) != _LEVELS:
    lines.append(
      f"sizes.autoencoder_multipliers must have {_LEVELS} levels, so that a latent token has 16 "
      f"pixels a side; got {len(sizes.autoencoder_multipliers)}"
    )
  return lines


def _relations_of_run(config: ml_collections.ConfigDict) -> list[str]:
  """Returns a line for every key of a run that a benchmark does not measure."""
  lines = []
  for key in ("height", "width"):
    side = config.image[key]
    if side % TOKEN_SIDE:
      lines.append(
        f"image.{key} must be a multiple of {TOKEN_SIDE}, the pixels of a latent token; "
        f"got {side}"
      )
  for key, expected in (("step.chain", "tree"), ("reflect_rounds", 1)):
    value = rules.leaves(config, RULES)[key]
    if value != expected:
      lines.append(f"{key} must be {expected!r} in a benchmark; got {value!r}")
  return lines

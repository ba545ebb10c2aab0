"""What every key of `configs/sft_shapes.py` may be, as `r3jax/run/config_rules.py` for R3."""

import math

import ml_collections

from r3jax.files import rules
from r3jax.model import autoencoder
from r3jax.worlds.shapes import prompts
from r3jax.worlds.shapes import scenes

_MOST = 2**31 - 1  # of int32
_COUNT = rules.Whole(1, _MOST)
_WIDTH = rules.Whole(1, 65_536)
_SHARE = rules.Real(0, 1)
_WEIGHT = rules.Real(0, 1e6)
_STAGE = {
  "num_steps": _COUNT,
  "batch_size": rules.Whole(1, 65_536),
  "learning_rate": rules.Real(1e-12, 1),
  "warmup": rules.Whole(0, _MOST),
}
STAGES = ("autoencoder", "vision", "text", "joint")
# A level of the autoencoder halves the sides, and a token has two latent cells a side.
_LEVELS = int(math.log2(scenes.CELL))

RULES: dict[str, rules.Rule] = {
  "seed": rules.Whole(0, 2**31 - 1),  # twice as large it is a seed, too
  "start": rules.Text("the path of a folder"),
  "log_every": _COUNT,
  "save_every": _COUNT,
  "stored_dtype": rules.OneOf(("bfloat16", "float16", "float32")),
  "model.hidden_size": _WIDTH,
  "model.intermediate_size": _WIDTH,
  "model.num_layers": rules.Whole(1, 1_000),
  "model.num_heads": rules.Whole(1, 1_000),
  "model.num_kv_heads": rules.Whole(1, 1_000),
  "model.vision_hidden_size": _WIDTH,
  "model.vision_intermediate_size": _WIDTH,
  "model.vision_num_layers": rules.Whole(1, 1_000),
  "model.vision_num_heads": rules.Whole(1, 1_000),
  "model.autoencoder_channels": _WIDTH,
  "model.autoencoder_multipliers": rules.Several(rules.Whole(1, 64)),
  **{f"{stage}.{key}": _STAGE[key] for stage in STAGES for key in _STAGE},
  "autoencoder.kl_weight": _WEIGHT,
  "joint.copies": rules.Whole(1, 1_000),
  "joint.flow_weight": _WEIGHT,
  "exam.every": _COUNT,
  "exam.prompts": rules.Whole(1, 10_000),
  "exam.images": rules.Whole(1, 10_000),
  "exam.points": rules.Whole(2, 1_000),
  "exam.batch_size": rules.Whole(1, 65_536),
  "exam.seed": rules.Whole(0, 2**31 - 1),
  "window.draft": rules.Interval(0, 1),
  "window.edit": _SHARE,
  "window.judgement": rules.Interval(0, 1),
  "window.answer": rules.Interval(0, 1),
  "mix.plan_flaws": _SHARE,
  "mix.instruction_flaws": _SHARE,
  "mix.judgement_flaws": _SHARE,
  "mix.answer_flaws": _SHARE,
  "mix.questions": _SHARE,
  "mix.descriptions": _SHARE,
  "mix.reflect_tags": rules.Table(prompts.TAGS, rules.Real(0, 1e6)),
}


def check(config: ml_collections.ConfigDict) -> None:
  """Checks every value of a config of supervised training, and how values go together.

  Raises:
    ValueError: values break their rules; the message has a line for each.
  """
  lines = rules.problems(config, RULES) or _relations(config)
  if lines:
    raise ValueError("\n".join(lines))


def _relations(config: ml_collections.ConfigDict) -> list[str]:
  """Returns a line for every relation between keys that does not hold."""
  return [
    *_relations_of_sizes(config.model),
    *_relations_of_stages(config),
    *_relations_of_mix(config.mix),
  ]


def _relations_of_sizes(model: ml_collections.ConfigDict) -> list[str]:
  lines = []
  # RoPE halves heads, and position tables quarter the width.
  if model.hidden_size % math.lcm(4, 2 * model.num_heads):
    lines.append(
      "model.hidden_size must be divisible by 4 and by 2 * model.num_heads; "
      f"got {model.hidden_size} and {model.num_heads} heads"
    )
  if model.num_heads % model.num_kv_heads:
    lines.append(
      "model.num_heads must be divisible by model.num_kv_heads; "
      f"got {model.num_heads} and {model.num_kv_heads}"
    )
  if model.vision_hidden_size % model.vision_num_heads:
    lines.append(
      "model.vision_hidden_size must be divisible by model.vision_num_heads; "
      f"got {model.vision_hidden_size} and {model.vision_num_heads}"
    )
  if model.autoencoder_channels % autoencoder.NUM_GROUPS:
    lines.append(
      f"model.autoencoder_channels must be divisible by {autoencoder.NUM_GROUPS}; "
      f"got {model.autoencoder_channels}"
    )
  num_levels = len(model.autoencoder_multipliers)
  if num_levels != _LEVELS:
    lines.append(
      f"model.autoencoder_multipliers must have {_LEVELS} levels, so that a cell of a scene is a"
      f" latent token; got {num_levels}"
    )
  return lines


def _relations_of_stages(config: ml_collections.ConfigDict) -> list[str]:
  lines = []
  for stage in STAGES:
    section = config[stage]
    if section.warmup >= section.num_steps:
      lines.append(
        f"{stage}.warmup must be below {stage}.num_steps ({section.num_steps}); "
        f"got {section.warmup}"
      )
  return lines


def _relations_of_mix(mix: ml_collections.ConfigDict) -> list[str]:
  lines = []
  share = mix.questions + mix.descriptions
  if share > 1:
    lines.append(
      "mix.questions + mix.descriptions must be at most 1, the share of both; "
      f"got {share:g}"
    )
  # Tags that are not named have the weight 1.
  if not any(mix.reflect_tags.get(tag, 1) for tag in prompts.TAGS):
    lines.append("mix.reflect_tags must be above 0 for a tag; all are 0")
  return lines

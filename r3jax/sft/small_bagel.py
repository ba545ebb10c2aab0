"""The small BAGEL of the embedded world: sizes, capacities, settings that only it needs."""

import ml_collections

from r3jax.agent import rollout_settings
from r3jax.model import architecture
from r3jax.model import image_encoders
from r3jax.rl import placement
from r3jax.sampling import classifier_free
from r3jax.sampling import decoding
from r3jax.sampling import schedules
from r3jax.sequence import layouts
from r3jax.sequence import protocol
from r3jax.sequence import tokenization
from r3jax.worlds.shapes import scenes
from r3jax.worlds.shapes import vocabulary

# Slots of the texts, begin and end included. The longest texts of the grammar have 12, 19, 18
# (questions), 42 and 21.
TEXT_CAPACITIES = {
  "prompt": 12,
  "thought": 24,
  "question": 18,
  "answer": 44,
  "instruction": 24,
}


# Of the times towards noise, in training and sampling.
SHIFT = 3.0
_GUIDED = (0.4, 1.0)  # times at which guidance acts


def sizes(model: ml_collections.ConfigDict) -> architecture.BagelConfig:
  """Returns the model's sizes for the 48x48 canvas: one latent token and one ViT patch per cell.

  Args:
    model: the section `model` of `configs/sft_shapes.py`.
  """
  tokenizer = tokenization.TextTokenizer(vocabulary.build_tokenizer())
  square = architecture.ImageTransform(
    scenes.CANVAS, scenes.CANVAS, scenes.CELL
  )
  return architecture.BagelConfig(
    llm=architecture.LLMConfig(
      hidden_size=model.hidden_size,
      intermediate_size=model.intermediate_size,
      num_layers=model.num_layers,
      num_heads=model.num_heads,
      num_kv_heads=model.num_kv_heads,
      vocab_size=tokenizer.size,
    ),
    vision=architecture.VisionConfig(
      hidden_size=model.vision_hidden_size,
      intermediate_size=model.vision_intermediate_size,
      num_layers=model.vision_num_layers,
      num_heads=model.vision_num_heads,
      patch_size=scenes.CELL,
      positions_per_side=scenes.GRID,
    ),
    autoencoder=architecture.AutoencoderConfig(
      channels=model.autoencoder_channels,
      multipliers=tuple(model.autoencoder_multipliers),
      num_res_blocks=1,
    ),
    special_ids=tokenizer.special_ids,
    max_latent_side=scenes.GRID,
    max_patches_per_side=scenes.GRID,
    autoencoder_transform=square,
    vision_transform=square,
  )


def capacities(
  tokenizer: tokenization.TextTokenizer, towers: image_encoders.Towers
) -> layouts.Capacities:
  """Returns the slots of every segment."""
  return layouts.Capacities(
    system=len(system_ids(tokenizer, protocol.GEN_THINK)),
    latent_grid=towers.latent_grid,
    vit_grid=towers.vit_grid,
    **TEXT_CAPACITIES,
  )


def system_ids(
  tokenizer: tokenization.TextTokenizer, prompt: str
) -> tuple[int, ...]:
  """Returns a system prompt's segment, begin and end included."""
  ids = tokenizer.special_ids
  return (ids.text_begin, *tokenizer.encode(prompt), ids.text_end)


def settings(
  tokenizer: tokenization.TextTokenizer,
  towers: image_encoders.Towers,
  points: int,
) -> rollout_settings.RolloutSettings:
  """Returns how the small model is measured: as `configs/r3_geneval.py:shapes` evaluates.

  Supervised training uses only its layouts and system prompts.

  Args:
    tokenizer: of the world.
    towers: of the model.
    points: times of the schedule of images.
  """
  text = decoding.TextSampling(temperature=0.3, top_p=0.9, axis=placement.AXIS)
  draft_guidance = classifier_free.Guidance(
    4.0, 1.0, "global", interval=_GUIDED
  )
  edit_guidance = classifier_free.Guidance(
    4.0, 1.5, "text_channel", interval=_GUIDED
  )
  return rollout_settings.RolloutSettings(
    capacities=capacities(tokenizer, towers),
    reason_text=text,
    reflect_text=text,
    reason_flow=_flow(draft_guidance, points),
    refine_flow=_flow(edit_guidance, points),
    system_reason=system_ids(tokenizer, protocol.GEN_THINK),
    system_reflect=system_ids(tokenizer, protocol.VLM_THINK),
  )


def _flow(
  guidance: classifier_free.Guidance, points: int
) -> rollout_settings.FlowSettings:
  """Returns how images are sampled, without noise."""
  return rollout_settings.FlowSettings(
    schedule=schedules.Schedule(points=points, shift=SHIFT),
    guidance=guidance,
    eta=schedules.Eta("constant", 1.0),
    sde_index_max=0,
  )

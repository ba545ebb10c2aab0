"""The small BAGEL of the embedded world: sizes, capacities, settings that only it needs."""

import ml_collections

from r3jax.agent import rollout_settings
from r3jax.model import architecture
from r3jax.model import image_encoders
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


def sft_settings(
  tokenizer: tokenization.TextTokenizer, towers: image_encoders.Towers
) -> rollout_settings.RolloutSettings:
  """Returns settings for supervised training, where only layouts and system prompts matter."""
  # Nothing is sampled in supervised training.
  greedy = decoding.TextSampling(temperature=0.0)
  flow = rollout_settings.FlowSettings(
    schedule=schedules.Schedule(points=2),
    guidance=classifier_free.Guidance(1.0, 1.0, "global"),
    eta=schedules.Eta("constant", 1.0),
    sde_index_max=0,
  )
  return rollout_settings.RolloutSettings(
    capacities=capacities(tokenizer, towers),
    reason_text=greedy,
    reflect_text=greedy,
    reason_flow=flow,
    refine_flow=flow,
    system_reason=system_ids(tokenizer, protocol.GEN_THINK),
    system_reflect=system_ids(tokenizer, protocol.VLM_THINK),
  )

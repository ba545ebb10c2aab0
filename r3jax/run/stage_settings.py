"""Builds the settings of the stages from a config, for training and for evaluation."""

import dataclasses

import ml_collections

from r3jax.agent import rollout_settings
from r3jax.model import image_encoders
from r3jax.rl import iteration_settings
from r3jax.rl import placement
from r3jax.sampling import classifier_free
from r3jax.sampling import decoding
from r3jax.sampling import schedules
from r3jax.sequence import layouts
from r3jax.sequence import protocol
from r3jax.sequence import tokenization

# Value of a guidance scale of `config.eval` that takes the one of training.
_AS_IN_TRAINING = -1


def for_rollouts(
  config: ml_collections.ConfigDict,
  tokenizer: tokenization.TextTokenizer,
  towers: image_encoders.Towers,
) -> rollout_settings.RolloutSettings:
  """Returns how the stages sample in training.

  Raises:
    ValueError: The config cannot be used.
  """
  text = decoding.TextSampling(
    config.text.temperature,
    config.text.top_p,
    config.text.top_k,
    placement.AXIS,
  )
  return rollout_settings.RolloutSettings(
    capacities=_capacities(config, tokenizer, towers),
    reason_text=text,
    reflect_text=text,
    reason_flow=_flow("reason", config.reason),
    refine_flow=_flow("refine", config.refine),
    system_reason=_system_prompt(tokenizer, protocol.GEN_THINK),
    system_reflect=_system_prompt(tokenizer, protocol.VLM_THINK),
    reference_loss=config.compat.reference_loss,
  )


def for_evaluation(
  config: ml_collections.ConfigDict,
  settings: rollout_settings.RolloutSettings,
) -> rollout_settings.RolloutSettings:
  """Returns how evaluation samples: ODE steps only, with its own points and temperature.

  Its guidance is that of training where `config.eval` does not set another one.

  Args:
    config: Config of the run.
    settings: How the stages sample in training.
  """
  text = dataclasses.replace(
    settings.reason_text, temperature=config.eval.temperature
  )

  def ode(
    flow: rollout_settings.FlowSettings, section: ml_collections.ConfigDict
  ) -> rollout_settings.FlowSettings:
    return dataclasses.replace(
      flow,
      schedule=dataclasses.replace(flow.schedule, points=config.eval.points),
      guidance=_guidance_of_evaluation(flow.guidance, section),
      sde_index_max=0,
    )

  return dataclasses.replace(
    settings,
    reason_text=text,
    reflect_text=text,
    reason_flow=ode(settings.reason_flow, config.eval.reason),
    refine_flow=ode(settings.refine_flow, config.eval.refine),
  )


def _guidance_of_evaluation(
  training: classifier_free.Guidance, section: ml_collections.ConfigDict
) -> classifier_free.Guidance:
  """Returns the guidance of a stage in evaluation.

  Args:
    training: Guidance of the stage in training.
    section: The stage's section of `config.eval`.
  """
  changes = {}
  for key in ("text_scale", "image_scale"):
    if section[key] != _AS_IN_TRAINING:
      changes[key] = section[key]
  if section.interval:
    changes["interval"] = tuple(section.interval)
  return dataclasses.replace(training, **changes)


def for_iteration(
  config: ml_collections.ConfigDict,
) -> iteration_settings.IterationSettings:
  """Returns what an iteration learns from, and how.

  Raises:
    ValueError: The config cannot be used.
  """
  return iteration_settings.IterationSettings(
    num_groups=config.groups_per_step,
    group_size=config.group_size,
    loss=iteration_settings.LossSettings(**config.loss),
    pool_perfect=config.pool.perfect,
    chain=config.step.chain,
    pool_source=config.pool.source,
    num_reflect_rounds=config.reflect_rounds,
    num_micro_batches=config.step.micro_batches,
  )


def _flow(
  name: str, section: ml_collections.ConfigDict
) -> rollout_settings.FlowSettings:
  """Returns how the images of a stage are sampled.

  Args:
    name: Name of the stage's section of the config, for errors.
    section: The section.

  Raises:
    ValueError: Its values do not go together.
  """
  guidance = classifier_free.Guidance(
    section.text_scale,
    section.image_scale,
    section.renorm,
    section.renorm_min,
    tuple(section.interval),
  )
  try:
    return rollout_settings.FlowSettings(
      schedule=schedules.Schedule(section.points, section.shift),
      guidance=guidance,
      eta=schedules.Eta(section.eta_mode, section.eta),
      sde_index_max=section.sde_index_max,
    )
  except ValueError as error:
    raise ValueError(f"{name}.{error}") from error


def _capacities(
  config: ml_collections.ConfigDict,
  tokenizer: tokenization.TextTokenizer,
  towers: image_encoders.Towers,
) -> layouts.Capacities:
  """Returns the slots of every segment."""
  sequence = config.sequence
  system_prompts = (protocol.GEN_THINK, protocol.VLM_THINK)
  return layouts.Capacities(
    system=max(len(_system_prompt(tokenizer, text)) for text in system_prompts),
    prompt=sequence.prompt_tokens,
    # Sampled texts have one slot more, for their end.
    thought=sequence.thought_tokens + 1,
    question=sequence.question_tokens,
    answer=sequence.answer_tokens + 1,
    instruction=sequence.instruction_tokens,
    latent_grid=towers.latent_grid,
    vit_grid=towers.vit_grid,
  )


def _system_prompt(
  tokenizer: tokenization.TextTokenizer, text: str
) -> tuple[int, ...]:
  """Returns the token ids of a system prompt, begin and end included."""
  special_ids = tokenizer.special_ids
  return (
    special_ids.text_begin,
    *tokenizer.encode(text),
    special_ids.text_end,
  )

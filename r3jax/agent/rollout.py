"""Rollouts of the three stages: think and draft, look and reflect, refine.

Sampling and scoring (`agent/scoring.py`) share contexts, layouts and velocities, so on-policy ratios
are 1 up to rounding. What a group shares (system prompt, prompt, source image) is computed once.
"""

import flax.struct
import jax
import jax.numpy as jnp

from r3jax import types
from r3jax.agent import actors
from r3jax.agent import contexts
from r3jax.agent import experience
from r3jax.agent import random_keys
from r3jax.agent import rollout_settings
from r3jax.model import layers
from r3jax.model import network
from r3jax.sampling import classifier_free
from r3jax.sampling import decoding
from r3jax.sampling import flow_matching
from r3jax.sequence import layouts


@jax.named_scope("decode")
def _decode(
  actor: actors.Actor,
  context: contexts.Context,
  name: str,
  sampling,
  keys: random_keys.Keys,
) -> decoding.Decoded:
  tokens = context.layout[name].capacity - 1
  uniforms = jax.vmap(lambda key: jax.random.uniform(key, (tokens,)))(
    keys.sample
  )
  return decoding.decode(
    actor.modules.bagel,
    actor.policy,
    context.layout,
    name,
    (context.cache,),
    context.lengths,
    uniforms,
    sampling,
  )


@jax.named_scope("flow")
def _sample_flow(
  actor: actors.Actor,
  context: contexts.Context,
  own: network.Cache,
  lengths,
  flow: rollout_settings.FlowSettings,
  names,
  keys: random_keys.Keys,
) -> flow_matching.Trajectory:
  """Samples the latents of a stage: one noise and one SDE index per group, SDE noise per sample."""
  layout, past = context.layout, (context.cache, own)
  bagel = actor.modules.bagel
  shape = (layout[names[0]].num_gen, bagel.config.latent_dim)
  dtype = layers.at_least_float32(bagel.dtype)
  branches = flow.branches(names)

  def velocity(latent, t, guided):
    active = branches if guided else branches[:1]
    output = actor.run(
      layout,
      {name: network.Noised(latent, t) for name in active},
      lengths,
      past,
    )
    found = actor.velocities(output, active)
    return (
      classifier_free.combine(flow.guidance, *found) if guided else found[0]
    )

  def draw_group(key):
    noise_key, index_key = jax.random.split(key)
    index = jax.random.randint(index_key, (), 0, max(flow.sde_index_max, 1))
    return jax.random.normal(noise_key, shape, dtype), index

  initial, index = (
    jnp.repeat(x, keys.samples, axis=0)
    for x in jax.vmap(draw_group)(keys.group)
  )
  plan = None
  if flow.sde_index_max:
    draw = lambda key, step: jax.random.normal(
      jax.random.fold_in(key, step), shape, dtype
    )
    plan = flow_matching.SDEPlan(
      index,
      lambda step: jax.vmap(lambda key: draw(key, step))(keys.sample),
      flow.eta,
    )
  return flow_matching.sample(
    velocity, initial, flow.schedule, flow.guided, plan, flow.on_step
  )


@flax.struct.dataclass
class Thought:
  """A sampled thought, and what drafting an image of it needs."""

  text: experience.Text
  context: contexts.Context
  cache: network.Cache  # of the thought


def think(
  actor: actors.Actor, prompts: experience.Prompts, keys: random_keys.Keys
) -> Thought:
  """Thinks about every prompt, `keys.samples` times per group."""
  context = contexts.reason_context(actor, prompts, keys.samples)
  found = _decode(actor, context, "thought", actor.settings.reason_text, keys)
  return Thought(
    experience.Text(found.ids, found.lengths, found.behavior_logprob),
    context,
    found.cache,
  )


def draft(
  actor: actors.Actor, thought: Thought, keys: random_keys.Keys
) -> experience.Reason:
  """Draws an image of every thought."""
  context, flow_settings = thought.context, actor.settings.reason_flow
  lengths = {**context.lengths, "thought": thought.text.lengths}
  flow = _sample_flow(
    actor, context, thought.cache, lengths, flow_settings, layouts.DRAFT, keys
  )
  return experience.Reason(
    thought.text, flow, actor.modules.towers.decode(actor.frozen, flow.latent)
  )


def reason(
  actor: actors.Actor, prompts: experience.Prompts, keys: random_keys.Keys
) -> experience.Reason:
  """Thinks about every prompt and drafts an image, `keys.samples` times per group."""
  text_keys, flow_keys = random_keys.split_keys(keys)
  return draft(actor, think(actor, prompts, text_keys), flow_keys)


def look(actor: actors.Actor, images: types.Images) -> experience.Source:
  """Prepares images for the reflect and refine stages: ViT features and clean latents."""
  towers = actor.modules.towers
  return experience.Source(
    images,
    towers.features(actor.frozen, images),
    towers.encode(actor.frozen, images),
  )


@jax.named_scope("reflect")
def reflect(
  actor: actors.Actor,
  prompts: experience.Prompts,
  source: experience.Source,
  keys: random_keys.Keys,
) -> experience.Text:
  """Looks at the source images and writes thoughts and instructions."""
  context = contexts.reflect_context(
    actor, prompts, source.features, keys.samples
  )
  answer = _decode(actor, context, "answer", actor.settings.reflect_text, keys)
  return experience.Text(answer.ids, answer.lengths, answer.behavior_logprob)


@jax.named_scope("refine")
def refine(
  actor: actors.Actor,
  source: experience.Source,
  instruction: experience.Instruction,
  keys: random_keys.Keys,
) -> experience.Refine:
  """Edits the source images as told; a sample that is told to stop keeps its source."""
  flow_settings = actor.settings.refine_flow
  context = contexts.refine_context(
    actor, source.latent, source.features, keys.samples
  )
  lengths = contexts.instruction_lengths(instruction)
  inputs = dict.fromkeys(lengths, instruction.ids)
  own = actor.run(context.layout, inputs, lengths, (context.cache,)).cache
  flow = _sample_flow(
    actor, context, own, lengths, flow_settings, layouts.EDIT, keys
  )
  edited = actor.modules.towers.decode(actor.frozen, flow.latent)
  kept = jnp.repeat(source.images, keys.samples, axis=0)
  return experience.Refine(
    flow, jnp.where(instruction.stop[:, None, None, None], kept, edited)
  )

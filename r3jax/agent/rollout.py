"""Rollouts of the stages: think and draft, look and reflect, refine (docs/algorithm.md#stages).

Sampling and scoring (`scoring.py`) share contexts, layouts and velocities, so that on-policy ratios
are 1 up to rounding. What a group shares (system prompt, prompt, source image) is computed once.
"""

from collections.abc import Mapping

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


@flax.struct.dataclass
class Thought:
  """A sampled thought, and what drafting an image of it needs.

  Attributes:
    text: the thought.
    context: what its group shares.
    cache: keys and values of the thought.
  """

  text: experience.Text
  context: contexts.Context
  cache: network.Cache


@flax.struct.dataclass
class Conditioning:
  """What the latents of the refine stage see.

  Attributes:
    context: the source images, which groups share.
    cache: keys and values of each sample's own instruction, in both copies.
    lengths: lengths of both copies.
  """

  context: contexts.Context
  cache: network.Cache
  lengths: Mapping[str, types.Lengths]  # [B] each


def reason(
  actor: actors.Actor, prompts: experience.Prompts, keys: random_keys.Keys
) -> experience.Reason:
  """Thinks about every prompt and drafts an image, `keys.samples_per_group` times per group."""
  text_keys, flow_keys = random_keys.split_keys(keys)
  thought = think(actor, prompts, text_keys)
  return draft(actor, thought, flow_keys)


def think(
  actor: actors.Actor, prompts: experience.Prompts, keys: random_keys.Keys
) -> Thought:
  """Writes a thought about every prompt, `keys.samples_per_group` times per group."""
  context = contexts.reason_context(actor, prompts, keys.samples_per_group)
  sampling = actor.settings.reason_text
  decoded = _decode(actor, context, "thought", sampling, keys)
  return Thought(_text(decoded), context, decoded.cache)


def draft(
  actor: actors.Actor, thought: Thought, keys: random_keys.Keys
) -> experience.Reason:
  """Draws an image of every thought."""
  trajectory = draft_flow(actor, thought, keys)
  images, is_finite = actor.modules.towers.decode(
    actor.frozen, trajectory.latent
  )
  return experience.Reason(thought.text, trajectory, images, is_finite)


def draft_flow(
  actor: actors.Actor, thought: Thought, keys: random_keys.Keys
) -> flow_matching.Trajectory:
  """Samples the latents of an image of every thought."""
  # The latents see system prompt, prompt and thought; without text, the system prompt alone.
  context = thought.context
  lengths = {**context.lengths, "thought": thought.text.lengths}
  return _sample_flow(
    actor,
    context,
    thought.cache,
    lengths,
    actor.settings.reason_flow,
    layouts.DRAFT,
    keys,
  )


def look(actor: actors.Actor, images: types.Images) -> experience.Source:
  """Prepares images for the reflect and refine stages: ViT features and clean latents."""
  towers = actor.modules.towers
  features = towers.features(actor.frozen, images)
  latent = towers.encode(actor.frozen, images)
  return experience.Source(images, features, latent)


@jax.named_scope("reflect")
def reflect(
  actor: actors.Actor,
  prompts: experience.Prompts,
  source: experience.Source,
  keys: random_keys.Keys,
) -> experience.Text:
  """Writes a thought and an instruction about every source image."""
  context = contexts.reflect_context(
    actor, prompts, source.features, keys.samples_per_group
  )
  sampling = actor.settings.reflect_text
  return _text(_decode(actor, context, "answer", sampling, keys))


@jax.named_scope("refine")
def refine(
  actor: actors.Actor,
  source: experience.Source,
  instruction: experience.Instruction,
  keys: random_keys.Keys,
) -> experience.Refine:
  """Edits the source images by the instructions; one that says to stop leaves the image as is."""
  conditioning = condition(actor, source, instruction, keys.samples_per_group)
  trajectory = edit_flow(actor, conditioning, keys)
  # A sample that stops is edited like the others, for a batch has one shape; its edit is dropped.
  edited, is_finite = actor.modules.towers.decode(
    actor.frozen, trajectory.latent
  )
  unedited = jnp.repeat(source.images, keys.samples_per_group, axis=0)
  stop = instruction.stop[:, None, None, None]
  images = jnp.where(stop, unedited, edited)
  return experience.Refine(trajectory, images, is_finite | instruction.stop)


def condition(
  actor: actors.Actor,
  source: experience.Source,
  instruction: experience.Instruction,
  samples_per_group: int,
) -> Conditioning:
  """Runs source images, and the instructions of `samples_per_group` samples about each."""
  context = contexts.refine_context(
    actor, source.latent, source.features, samples_per_group
  )
  # The instruction runs once, and every step of the flow attends to its cache. Both of its
  # copies, with the image as context and without, hold the same tokens.
  lengths = contexts.instruction_lengths(instruction)
  inputs = dict.fromkeys(lengths, instruction.ids)
  past = (context.cache,)
  cache = actor.run(context.layout, inputs, lengths, past).cache
  return Conditioning(context, cache, lengths)


def edit_flow(
  actor: actors.Actor, conditioning: Conditioning, keys: random_keys.Keys
) -> flow_matching.Trajectory:
  """Samples the latents of an edit by every instruction."""
  return _sample_flow(
    actor,
    conditioning.context,
    conditioning.cache,
    conditioning.lengths,
    actor.settings.refine_flow,
    layouts.EDIT,
    keys,
  )


def _text(decoded: decoding.Decoded) -> experience.Text:
  return experience.Text(decoded.ids, decoded.lengths, decoded.behavior_logprob)


@jax.named_scope("decode")
def _decode(
  actor: actors.Actor,
  context: contexts.Context,
  name: str,
  sampling: decoding.TextSampling,
  keys: random_keys.Keys,
) -> decoding.Decoded:
  """Samples the text segment `name` after the context, with randomness of each sample's own."""
  # One uniform number for every token that may be drawn; the begin token is given.
  num_tokens = context.layout[name].capacity - 1

  def draw_uniforms(key: types.Key) -> jax.Array:
    return jax.random.uniform(key, (num_tokens,))

  return decoding.decode(
    actor.modules.bagel,
    actor.policy,
    context.layout,
    name,
    (context.cache,),
    context.lengths,
    jax.vmap(draw_uniforms)(keys.sample),
    sampling,
  )


@jax.named_scope("flow")
def _sample_flow(
  actor: actors.Actor,
  context: contexts.Context,
  text_cache: network.Cache,
  lengths: Mapping[str, types.Lengths],
  flow: rollout_settings.FlowSettings,
  names: tuple[str, ...],
  keys: random_keys.Keys,
) -> flow_matching.Trajectory:
  """Samples the latents of a stage.

  The samples of a group share the initial noise and the number of the SDE step, so that their
  rewards differ by text and by the noise of that one step.

  Args:
    actor: the policy.
    context: what groups share.
    text_cache: keys and values of each sample's own text.
    lengths: lengths of all text segments before the latents.
    flow: how to sample.
    names: the stage's noise segments: full context, without text[, without
      image].
    keys: random keys.
  """
  layout = context.layout
  past = (context.cache, text_cache)
  bagel = actor.modules.bagel
  # Latents stay in float32 whatever the compute dtype: log-probs compare them with their means.
  latent_shape = (layout[names[0]].num_gen, bagel.config.latent_dim)
  dtype = layers.at_least_float32(bagel.dtype)
  branches = flow.branches(names)

  def velocity(
    latent: types.Latent, t: types.Time, is_guided: bool
  ) -> types.Latent:
    # All branches run side by side in one pass.
    active = branches if is_guided else branches[:1]
    inputs = dict.fromkeys(active, network.Noised(latent, t))
    output = actor.run(layout, inputs, lengths, past)
    velocities = actor.velocities(output, active)
    if not is_guided:
      return velocities[0]
    return classifier_free.combine(flow.guidance, *velocities)

  def draw_shared(group_key: types.Key) -> tuple[jax.Array, jax.Array]:
    noise_key, index_key = jax.random.split(group_key)
    index = jax.random.randint(index_key, (), 0, max(flow.sde_index_max, 1))
    return jax.random.normal(noise_key, latent_shape, dtype), index

  # Drawn even where all steps are ODE steps, so that the noise is the same with and without SDE.
  noise, sde_index = jax.vmap(draw_shared)(keys.group)
  initial = jnp.repeat(noise, keys.samples_per_group, axis=0)
  sde_index = jnp.repeat(sde_index, keys.samples_per_group, axis=0)

  def sde_noise(step: jax.Array) -> types.Latent:
    # The noise depends on the number of the step, not on which loop (guided or not) runs it.
    def draw(sample_key: types.Key) -> jax.Array:
      step_key = jax.random.fold_in(sample_key, step)
      return jax.random.normal(step_key, latent_shape, dtype)

    return jax.vmap(draw)(keys.sample)

  plan = None
  if flow.sde_index_max:
    plan = flow_matching.SDEPlan(sde_index, sde_noise, flow.eta)
  return flow_matching.sample(
    velocity, initial, flow.schedule, flow.guided, plan
  )

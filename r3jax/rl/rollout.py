"""Rollouts of the three stages, and the forward passes that score them.

Sampling and scoring share contexts, layouts and velocities, so on-policy ratios are 1 up to
rounding. What a group shares (system prompt, prompt, source image) is computed once per group.
"""

from collections.abc import Mapping
import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp

from r3jax import types
from r3jax.models import bagel as bagel_lib
from r3jax.models import layers
from r3jax.models import policy as policy_lib
from r3jax.rl import compat
from r3jax.rl import settings as settings_lib
from r3jax.sampling import flow as flow_lib
from r3jax.sampling import guidance as guidance_lib
from r3jax.sampling import text as text_lib
from r3jax.sequence import layout as layout_lib
from r3jax.sequence import stages


@flax.struct.dataclass
class Prompts:
  """What the groups are asked for; one row per group."""

  ids: jax.Array  # [G, P] prompt segments
  length: jax.Array  # [G]
  question: jax.Array  # [G, Q] reflection questions
  question_length: jax.Array  # [G]
  target: object  # pytree of [G, ...]: what the reward compares with
  index: jax.Array  # [G] int32 number of the prompt in its data set


@flax.struct.dataclass
class Keys:
  """Randomness of one stage: per group and per sample."""

  group: types.Key  # [G]
  sample: types.Key  # [B]

  @property
  def samples(self) -> int:
    """Samples per group on this device."""
    return self.sample.shape[0] // self.group.shape[0]


@flax.struct.dataclass
class Text:
  """A sampled text segment as the loss needs it."""

  ids: jax.Array  # [B, T]
  lengths: jax.Array  # [B]
  behavior_logprob: jax.Array  # [B, T - 1]


# Compiled apart only to be traced once: the same segments run in rollout, loss and reference.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(bagel: bagel_lib.Bagel, layout: layout_lib.Layout, policy: types.Params, inputs, lengths, past):
  return bagel.apply({"params": policy}, layout, inputs, lengths, past)


_SLOTS = 64  # of a text whose logits exist at once


@dataclasses.dataclass(frozen=True)
class Actor:
  """A policy at work: modules, parameters and settings that every stage needs.

  Attributes:
    modules: the Linen modules.
    policy: trained parameters.
    frozen: {"vision", "autoencoder"} parameters.
    settings: the iteration.
  """

  modules: settings_lib.Modules
  policy: types.Params
  frozen: types.Params
  settings: settings_lib.Settings

  def run(self, layout, inputs, lengths, past=()) -> bagel_lib.Output:
    """Runs segments through the policy, see `Bagel.__call__`."""
    return _run(self.modules.bagel, layout, self.policy, inputs, lengths, past)

  def velocities(self, output: bagel_lib.Output, names: tuple[str, ...]) -> tuple[types.Latent, ...]:
    """Reads the velocities of the named noise segments."""
    return tuple(self._read(output.latent(name), "velocity") for name in names)

  def logprob(self, hidden: types.Hidden, ids: types.TokenIds) -> jax.Array:
    """Returns the log-probs of ids[:, 1:] given the hidden states of a text segment, [B, T - 1].

    The logits of a long segment exist for some of its slots at a time, in the backward pass too.
    """
    hidden, ids = hidden[:, :-1], ids[:, 1:]

    @jax.checkpoint
    def read(hidden, ids):
      return text_lib.logprob(self._read(hidden, "logits"), ids)

    parts = [slice(at, at + _SLOTS) for at in range(0, ids.shape[1], _SLOTS)]
    return jnp.concatenate([read(hidden[:, part], ids[:, part]) for part in parts], axis=1)

  def _read(self, hidden: types.Hidden, method: str) -> jax.Array:
    return self.modules.bagel.apply({"params": self.policy}, hidden, method=method)


def sampler(modules: settings_lib.Modules, policy: types.Params, frozen: types.Params, settings) -> Actor:
  """Returns an actor for rollouts; takes what `Actor` takes.

  Its weights are in the compute dtype and where the rollouts' rules put them: gathered once, and
  not once per token.
  """
  bagel = modules.bagel.clone(rules=modules.rollout_rules)
  policy = policy_lib.placed(bagel, policy_lib.narrowed(policy, bagel.dtype))
  return Actor(dataclasses.replace(modules, bagel=bagel), policy, frozen, settings)


def _system(actor: Actor, ids: tuple[int, ...], rows: int) -> jax.Array:
  capacity = actor.settings.capacities.system  # that of the longer of both prompts
  return jnp.broadcast_to(jnp.pad(jnp.array(ids, jnp.int32), (0, capacity - len(ids))), (rows, capacity))


def _full(length: int, rows: int) -> types.Lengths:
  return jnp.full(rows, length, jnp.int32)


@flax.struct.dataclass
class Context:
  """The cached part of a stage that a group shares."""

  cache: bagel_lib.Cache  # rows of groups
  lengths: Mapping[str, types.Lengths]  # [B] of the shared text segments, per sample
  layout: layout_lib.Layout = flax.struct.field(pytree_node=False)


def _shared(actor: Actor, layout, inputs, lengths, samples: int) -> Context:
  cache = actor.run(layout, inputs, lengths).cache
  return Context(cache, {name: jnp.repeat(n, samples) for name, n in lengths.items()}, layout)


def reason_context(actor: Actor, prompts: Prompts, samples: int) -> Context:
  """Returns the cached T(system) T(prompt) of every group."""
  ids, rows = actor.settings.system_reason, prompts.ids.shape[0]
  inputs = {"system": _system(actor, ids, rows), "prompt": prompts.ids}
  lengths = {"system": _full(len(ids), rows), "prompt": prompts.length}
  return _shared(actor, stages.reason(actor.settings.capacities), inputs, lengths, samples)


def reflect_context(actor: Actor, prompts: Prompts, features: jax.Array, samples: int) -> Context:
  """Returns the cached T(system) V(image) T(question) of every group."""
  ids, rows = actor.settings.system_reflect, prompts.ids.shape[0]
  inputs = {"system": _system(actor, ids, rows), "seen": features, "question": prompts.question}
  lengths = {"system": _full(len(ids), rows), "question": prompts.question_length}
  return _shared(actor, stages.reflect(actor.settings.capacities), inputs, lengths, samples)


def refine_context(actor: Actor, source: types.Latent, features: jax.Array, samples: int) -> Context:
  """Returns the cached A(image) V(image) of every group."""
  clean = bagel_lib.Noised(source, jnp.zeros(source.shape[0], source.dtype))
  inputs = {"source": clean, "seen": features}
  return _shared(actor, stages.refine(actor.settings.capacities), inputs, {}, samples)


@jax.named_scope("decode")
def _decode(actor: Actor, context: Context, name: str, sampling, keys: Keys) -> text_lib.Decoded:
  tokens = context.layout[name].capacity - 1
  uniforms = jax.vmap(lambda key: jax.random.uniform(key, (tokens,)))(keys.sample)
  return text_lib.decode(
      actor.modules.bagel, actor.policy, context.layout, name, (context.cache,), context.lengths, uniforms, sampling
  )


@jax.named_scope("flow")
def _sample_flow(
    actor: Actor, context: Context, own: bagel_lib.Cache, lengths, flow: settings_lib.FlowSettings, names, keys: Keys
) -> flow_lib.Trajectory:
  """Samples the latents of a stage: one noise and one SDE index per group, SDE noise per sample."""
  layout, past = context.layout, (context.cache, own)
  bagel = actor.modules.bagel
  shape = (layout[names[0]].num_gen, bagel.config.latent_dim)
  dtype = layers.at_least_float32(bagel.dtype)
  branches = flow.branches(names)

  def velocity(latent, t, guided):
    active = branches if guided else branches[:1]
    output = actor.run(layout, {name: bagel_lib.Noised(latent, t) for name in active}, lengths, past)
    found = actor.velocities(output, active)
    return guidance_lib.combine(flow.guidance, *found) if guided else found[0]

  def draw_group(key):
    noise_key, index_key = jax.random.split(key)
    index = jax.random.randint(index_key, (), 0, max(flow.sde_index_max, 1))
    return jax.random.normal(noise_key, shape, dtype), index

  initial, index = (jnp.repeat(x, keys.samples, axis=0) for x in jax.vmap(draw_group)(keys.group))
  plan = None
  if flow.sde_index_max:
    draw = lambda key, step: jax.random.normal(jax.random.fold_in(key, step), shape, dtype)
    plan = flow_lib.SDEPlan(index, lambda step: jax.vmap(lambda key: draw(key, step))(keys.sample))
  return flow_lib.sample(velocity, initial, flow.schedule, flow.guided, flow.eta, plan, flow.on_step)


@flax.struct.dataclass
class Reason:
  """A rollout of the reason stage."""

  text: Text
  flow: flow_lib.Trajectory
  images: types.Images  # [B, H, W, 3]


def numbered_keys(seed: int, ids: jax.Array) -> Keys:
  """Returns the keys of rows that are groups of one sample; ids are [B, n] int32 numbers of each row."""

  def fold(row):
    key = jax.random.key(seed)
    for number in row:
      key = jax.random.fold_in(key, number)
    return jax.random.split(key)

  pair = jax.vmap(fold)(ids)
  return Keys(pair[:, 0], pair[:, 1])


def split_keys(keys: Keys) -> tuple[Keys, Keys]:
  """Returns two independent sets of keys."""
  pair = jax.vmap(lambda key: jax.random.split(key))
  group, sample = pair(keys.group), pair(keys.sample)
  return Keys(group[:, 0], sample[:, 0]), Keys(group[:, 1], sample[:, 1])


@flax.struct.dataclass
class Thought:
  """A sampled thought, and what drafting an image of it needs."""

  text: Text
  context: Context
  cache: bagel_lib.Cache  # of the thought


def think(actor: Actor, prompts: Prompts, keys: Keys) -> Thought:
  """Thinks about every prompt, `keys.samples` times per group."""
  context = reason_context(actor, prompts, keys.samples)
  found = _decode(actor, context, "thought", actor.settings.reason_text, keys)
  return Thought(Text(found.ids, found.lengths, found.behavior_logprob), context, found.cache)


def draft(actor: Actor, thought: Thought, keys: Keys) -> Reason:
  """Draws an image of every thought."""
  context, flow_settings = thought.context, actor.settings.reason_flow
  lengths = {**context.lengths, "thought": thought.text.lengths}
  flow = _sample_flow(actor, context, thought.cache, lengths, flow_settings, stages.DRAFT, keys)
  return Reason(thought.text, flow, actor.modules.towers.decode(actor.frozen, flow.latent))


def reason(actor: Actor, prompts: Prompts, keys: Keys) -> Reason:
  """Thinks about every prompt and drafts an image, `keys.samples` times per group."""
  text_keys, flow_keys = split_keys(keys)
  return draft(actor, think(actor, prompts, text_keys), flow_keys)


@flax.struct.dataclass
class Source:
  """The images that groups reflect on; one row per group."""

  images: types.Images  # [G, H, W, 3]
  features: jax.Array  # [G, N, vision hidden]
  latent: types.Latent  # [G, N, C]


def look(actor: Actor, images: types.Images) -> Source:
  """Prepares images for the reflect and refine stages: ViT features and clean latents."""
  towers = actor.modules.towers
  return Source(images, towers.features(actor.frozen, images), towers.encode(actor.frozen, images))


@jax.named_scope("reflect")
def reflect(actor: Actor, prompts: Prompts, source: Source, keys: Keys) -> Text:
  """Looks at the source images and writes thoughts and instructions."""
  context = reflect_context(actor, prompts, source.features, keys.samples)
  answer = _decode(actor, context, "answer", actor.settings.reflect_text, keys)
  return Text(answer.ids, answer.lengths, answer.behavior_logprob)


@flax.struct.dataclass
class Instruction:
  """What the refine stage is told; one row per sample."""

  ids: jax.Array  # [B, I]
  lengths: jax.Array  # [B]
  stop: jax.Array  # [B] "no further edit": the image stays


def _instruction_lengths(instruction: Instruction) -> Mapping[str, types.Lengths]:
  return {"instruction": instruction.lengths, "instruction_alone": instruction.lengths}


@flax.struct.dataclass
class Refine:
  """A rollout of the refine stage."""

  flow: flow_lib.Trajectory
  images: types.Images  # [B, H, W, 3] the source where nothing was edited


@jax.named_scope("refine")
def refine(actor: Actor, source: Source, instruction: Instruction, keys: Keys) -> Refine:
  """Edits the source images as told; a sample that is told to stop keeps its source."""
  flow_settings = actor.settings.refine_flow
  context = refine_context(actor, source.latent, source.features, keys.samples)
  lengths = _instruction_lengths(instruction)
  inputs = {name: instruction.ids for name in lengths}
  own = actor.run(context.layout, inputs, lengths, (context.cache,)).cache
  flow = _sample_flow(actor, context, own, lengths, flow_settings, stages.EDIT, keys)
  edited = actor.modules.towers.decode(actor.frozen, flow.latent)
  kept = jnp.repeat(source.images, keys.samples, axis=0)
  return Refine(flow, jnp.where(instruction.stop[:, None, None, None], kept, edited))


@flax.struct.dataclass
class Pass:
  """One forward pass over a recorded rollout."""

  output: bagel_lib.Output
  flow: settings_lib.FlowSettings = flax.struct.field(pytree_node=False)  # that images are scored with


def reason_pass(actor: Actor, prompts: Prompts, rollout: Reason) -> Pass:
  """Runs a reason rollout: the thought, and the latent before the SDE step in every branch."""
  flow = actor.settings.reason_flow
  samples = rollout.text.ids.shape[0] // prompts.ids.shape[0]
  context = reason_context(actor, prompts, samples)
  layout = context.layout
  if actor.settings.reference_loss:
    flow, layout = compat.reason(flow, layout)
  noised = bagel_lib.Noised(rollout.flow.before, rollout.flow.t)
  inputs = {"thought": rollout.text.ids, **{name: noised for name in flow.branches(stages.DRAFT)}}
  lengths = {**context.lengths, "thought": rollout.text.lengths}
  return Pass(actor.run(layout, inputs, lengths, (context.cache,)), flow)


def reflect_pass(actor: Actor, prompts: Prompts, source: Source, text: Text) -> bagel_lib.Output:
  """Runs sampled reflections."""
  samples = text.ids.shape[0] // prompts.ids.shape[0]
  context = reflect_context(actor, prompts, source.features, samples)
  lengths = {**context.lengths, "answer": text.lengths}
  return actor.run(context.layout, {"answer": text.ids}, lengths, (context.cache,))


def refine_pass(actor: Actor, source: Source, instruction: Instruction, rollout: Refine) -> Pass:
  """Runs sampled edits: the instructions, and the latent before the SDE step in every branch."""
  flow = actor.settings.refine_flow
  samples = instruction.ids.shape[0] // source.latent.shape[0]
  context = refine_context(actor, source.latent, source.features, samples)
  layout = context.layout
  if actor.settings.reference_loss:
    flow, layout = compat.refine(flow, layout)
  noised = bagel_lib.Noised(rollout.flow.before, rollout.flow.t)
  lengths = _instruction_lengths(instruction)
  inputs = {name: instruction.ids for name in lengths} | {name: noised for name in flow.branches(stages.EDIT)}
  return Pass(actor.run(layout, inputs, lengths, (context.cache,)), flow)


def scored_velocity(actor: Actor, run: Pass, names, t: types.Time) -> types.Latent:
  """Returns the velocity [B, N, C] that images are scored with, out of the branches among `names`."""
  found = actor.velocities(run.output, run.flow.branches(names))
  return guidance_lib.combine_where_active(run.flow.guidance, t, found) if len(found) > 1 else found[0]


def score_reason(actor: Actor, prompts: Prompts, rollout: Reason) -> tuple[jax.Array, types.Latent]:
  """Recomputes a reason rollout in one forward pass.

  Returns:
    Log-probs of the thought [B, T - 1] and the guided velocity at the SDE step [B, N, C].
  """
  run = reason_pass(actor, prompts, rollout)
  velocity = scored_velocity(actor, run, stages.DRAFT, rollout.flow.t)
  return actor.logprob(run.output.text("thought"), rollout.text.ids), velocity


def score_reflect(actor: Actor, prompts: Prompts, source: Source, text: Text) -> jax.Array:
  """Recomputes the log-probs of sampled reflections, [B, T - 1]."""
  return actor.logprob(reflect_pass(actor, prompts, source, text).text("answer"), text.ids)


def score_refine(actor: Actor, source: Source, instruction: Instruction, rollout: Refine) -> types.Latent:
  """Recomputes the guided velocity of sampled edits at their SDE step, [B, N, C]."""
  return scored_velocity(actor, refine_pass(actor, source, instruction, rollout), stages.EDIT, rollout.flow.t)

"""Forward passes that score recorded rollouts with the functions that sampled them."""

import flax.struct
import jax

from r3jax import types
from r3jax.agent import actors
from r3jax.agent import contexts
from r3jax.agent import experience
from r3jax.agent import reference_loss
from r3jax.agent import rollout_settings
from r3jax.model import network
from r3jax.sampling import classifier_free
from r3jax.sequence import layouts


@flax.struct.dataclass
class Pass:
  """One forward pass over a recorded rollout."""

  output: network.Output
  # that images are scored with
  flow: rollout_settings.FlowSettings = flax.struct.field(pytree_node=False)


def reason_pass(
  actor: actors.Actor,
  prompts: experience.Prompts,
  rollout: experience.Reason,
) -> Pass:
  """Runs a reason rollout: the thought, and the latent before the SDE step in every branch."""
  flow = actor.settings.reason_flow
  samples = rollout.text.ids.shape[0] // prompts.ids.shape[0]
  context = contexts.reason_context(actor, prompts, samples)
  layout = context.layout
  if actor.settings.reference_loss:
    flow, layout = reference_loss.reason(flow, layout)
  noised = network.Noised(rollout.flow.before, rollout.flow.t)
  inputs = {
    "thought": rollout.text.ids,
    **dict.fromkeys(flow.branches(layouts.DRAFT), noised),
  }
  lengths = {**context.lengths, "thought": rollout.text.lengths}
  return Pass(actor.run(layout, inputs, lengths, (context.cache,)), flow)


def reflect_pass(
  actor: actors.Actor,
  prompts: experience.Prompts,
  source: experience.Source,
  text: experience.Text,
) -> network.Output:
  """Runs sampled reflections."""
  samples = text.ids.shape[0] // prompts.ids.shape[0]
  context = contexts.reflect_context(actor, prompts, source.features, samples)
  lengths = {**context.lengths, "answer": text.lengths}
  return actor.run(
    context.layout, {"answer": text.ids}, lengths, (context.cache,)
  )


def refine_pass(
  actor: actors.Actor,
  source: experience.Source,
  instruction: experience.Instruction,
  rollout: experience.Refine,
) -> Pass:
  """Runs sampled edits: the instructions, and the latent before the SDE step in every branch."""
  flow = actor.settings.refine_flow
  samples = instruction.ids.shape[0] // source.latent.shape[0]
  context = contexts.refine_context(
    actor, source.latent, source.features, samples
  )
  layout = context.layout
  if actor.settings.reference_loss:
    flow, layout = reference_loss.refine(flow, layout)
  noised = network.Noised(rollout.flow.before, rollout.flow.t)
  lengths = contexts.instruction_lengths(instruction)
  inputs = dict.fromkeys(lengths, instruction.ids) | dict.fromkeys(
    flow.branches(layouts.EDIT), noised
  )
  return Pass(actor.run(layout, inputs, lengths, (context.cache,)), flow)


def scored_velocity(
  actor: actors.Actor, run: Pass, names, t: types.Time
) -> types.Latent:
  """Returns the velocity [B, N, C] that images are scored with, out of the branches among `names`."""
  found = actor.velocities(run.output, run.flow.branches(names))
  return (
    classifier_free.combine_where_active(run.flow.guidance, t, found)
    if len(found) > 1
    else found[0]
  )


def score_reason(
  actor: actors.Actor,
  prompts: experience.Prompts,
  rollout: experience.Reason,
) -> tuple[jax.Array, types.Latent]:
  """Recomputes a reason rollout in one forward pass.

  Returns:
    Log-probs of the thought [B, T - 1] and the guided velocity at the SDE step [B, N, C].
  """
  run = reason_pass(actor, prompts, rollout)
  velocity = scored_velocity(actor, run, layouts.DRAFT, rollout.flow.t)
  return actor.logprob(run.output.text("thought"), rollout.text.ids), velocity


def score_reflect(
  actor: actors.Actor,
  prompts: experience.Prompts,
  source: experience.Source,
  text: experience.Text,
) -> jax.Array:
  """Recomputes the log-probs of sampled reflections, [B, T - 1]."""
  return actor.logprob(
    reflect_pass(actor, prompts, source, text).text("answer"), text.ids
  )


def score_refine(
  actor: actors.Actor,
  source: experience.Source,
  instruction: experience.Instruction,
  rollout: experience.Refine,
) -> types.Latent:
  """Recomputes the guided velocity of sampled edits at their SDE step, [B, N, C]."""
  return scored_velocity(
    actor,
    refine_pass(actor, source, instruction, rollout),
    layouts.EDIT,
    rollout.flow.t,
  )

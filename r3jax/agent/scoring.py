"""Forward passes that score recorded rollouts with the functions that sampled them.

One pass over a recorded sequence gives the log-probs of its text and the velocity at its SDE step.
Velocities are guided as in the rollout, so that ratios are 1 as long as the policy has not changed.
"""

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
from r3jax.sampling import flow_matching
from r3jax.sequence import layouts


@flax.struct.dataclass
class Outputs:
  """What a policy gives recorded samples.

  Attributes:
    logprob: log-probs of the text; entry j belongs to ids[:, j + 1].
    velocity: guided velocity at the latent before the SDE step.
  """

  logprob: jax.Array  # [B, T - 1]
  velocity: types.Latent  # [B, N, C]


@flax.struct.dataclass
class Pass:
  """One forward pass with noise segments.

  Attributes:
    output: hidden states of the segments that ran.
    flow: settings that images are scored with.
  """

  output: network.Output
  flow: rollout_settings.FlowSettings = flax.struct.field(pytree_node=False)


def score_reason(
  actor: actors.Actor,
  prompts: experience.Prompts,
  recorded: experience.Recorded,
) -> Outputs:
  """Scores thoughts and drafts in one forward pass."""
  run = reason_pass(actor, prompts, recorded)
  velocity = scored_velocity(actor, run, layouts.DRAFT, recorded.trajectory.t)
  thought = run.output.text("thought")
  return Outputs(actor.logprob(thought, recorded.text.ids), velocity)


def score_edit(
  actor: actors.Actor,
  prompts: experience.Prompts,
  source: experience.Source,
  recorded: experience.RecordedEdit,
) -> Outputs:
  """Scores reflections and edits, which are sequences of their own."""
  output = reflect_pass(actor, prompts, source, recorded.text)
  logprob = actor.logprob(output.text("answer"), recorded.text.ids)
  run = refine_pass(actor, source, recorded.instruction, recorded.trajectory)
  velocity = scored_velocity(actor, run, layouts.EDIT, recorded.trajectory.t)
  return Outputs(logprob, velocity)


def reason_pass(
  actor: actors.Actor,
  prompts: experience.Prompts,
  recorded: experience.Recorded,
) -> Pass:
  """Runs the thought, and the latent before the SDE step in every branch of the guidance."""
  text = recorded.text
  # Of this device or micro-batch; groups may be cut.
  samples_per_group = text.ids.shape[0] // prompts.ids.shape[0]
  context = contexts.reason_context(actor, prompts, samples_per_group)
  flow = actor.settings.reason_flow
  layout = context.layout
  if actor.settings.reference_loss:
    flow, layout = reference_loss.reason(flow, layout)
  # Thought and latents run together: the mask lets latents attend to the thought, not vice versa.
  noised = _before_sde_step(recorded.trajectory)
  branches = flow.branches(layouts.DRAFT)
  inputs = {"thought": text.ids, **dict.fromkeys(branches, noised)}
  lengths = {**context.lengths, "thought": text.lengths}
  output = actor.run(layout, inputs, lengths, (context.cache,))
  return Pass(output, flow)


def reflect_pass(
  actor: actors.Actor,
  prompts: experience.Prompts,
  source: experience.Source,
  text: experience.Text,
) -> network.Output:
  """Runs the reflections."""
  samples_per_group = text.ids.shape[0] // prompts.ids.shape[0]
  context = contexts.reflect_context(
    actor, prompts, source.features, samples_per_group
  )
  inputs = {"answer": text.ids}
  lengths = {**context.lengths, "answer": text.lengths}
  return actor.run(context.layout, inputs, lengths, (context.cache,))


def refine_pass(
  actor: actors.Actor,
  source: experience.Source,
  instruction: experience.Instruction,
  trajectory: flow_matching.Trajectory,
) -> Pass:
  """Runs the instruction, and the latent before the SDE step in every branch of the guidance."""
  samples_per_group = instruction.ids.shape[0] // source.latent.shape[0]
  context = contexts.refine_context(
    actor, source.latent, source.features, samples_per_group
  )
  flow = actor.settings.refine_flow
  layout = context.layout
  if actor.settings.reference_loss:
    flow, layout = reference_loss.refine(flow, layout)
  noised = _before_sde_step(trajectory)
  branches = flow.branches(layouts.EDIT)
  lengths = contexts.instruction_lengths(instruction)
  inputs = {
    **dict.fromkeys(lengths, instruction.ids),
    **dict.fromkeys(branches, noised),
  }
  output = actor.run(layout, inputs, lengths, (context.cache,))
  return Pass(output, flow)


def scored_velocity(
  actor: actors.Actor, run: Pass, names: tuple[str, ...], t: types.Time
) -> types.Latent:
  """Returns the velocity that images are scored with, [B, N, C].

  Args:
    actor: reads velocities from hidden states.
    run: a forward pass.
    names: the stage's noise segments: full context, without text[, without
      image].
    t: time of the SDE step; it decides whether the velocity is guided.
  """
  # The copies that guidance needs are segments of the same pass.
  velocities = actor.velocities(run.output, run.flow.branches(names))
  if len(velocities) == 1:
    return velocities[0]
  return classifier_free.combine_where_active(run.flow.guidance, t, velocities)


def _before_sde_step(trajectory: flow_matching.Trajectory) -> network.Noised:
  return network.Noised(trajectory.before, trajectory.t)

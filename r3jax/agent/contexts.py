"""The cached part of every stage that a group shares: computed once per group."""

from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp

from r3jax import types
from r3jax.agent import actors
from r3jax.agent import experience
from r3jax.model import network
from r3jax.sequence import layouts
from r3jax.sequence import segments


def _system(actor: actors.Actor, ids: tuple[int, ...], rows: int) -> jax.Array:
  # that of the longer of both prompts
  capacity = actor.settings.capacities.system
  return jnp.broadcast_to(
    jnp.pad(jnp.array(ids, jnp.int32), (0, capacity - len(ids))),
    (rows, capacity),
  )


def _full(length: int, rows: int) -> types.Lengths:
  return jnp.full(rows, length, jnp.int32)


@flax.struct.dataclass
class Context:
  """The cached part of a stage that a group shares."""

  cache: network.Cache  # rows of groups
  # [B] of the shared text segments, per sample
  lengths: Mapping[str, types.Lengths]
  layout: segments.Layout = flax.struct.field(pytree_node=False)


def _shared(
  actor: actors.Actor, layout, inputs, lengths, samples: int
) -> Context:
  cache = actor.run(layout, inputs, lengths).cache
  return Context(
    cache, {name: jnp.repeat(n, samples) for name, n in lengths.items()}, layout
  )


def reason_context(
  actor: actors.Actor, prompts: experience.Prompts, samples: int
) -> Context:
  """Returns the cached T(system) T(prompt) of every group."""
  ids, rows = actor.settings.system_reason, prompts.ids.shape[0]
  inputs = {"system": _system(actor, ids, rows), "prompt": prompts.ids}
  lengths = {"system": _full(len(ids), rows), "prompt": prompts.length}
  return _shared(
    actor, layouts.reason(actor.settings.capacities), inputs, lengths, samples
  )


def reflect_context(
  actor: actors.Actor,
  prompts: experience.Prompts,
  features: jax.Array,
  samples: int,
) -> Context:
  """Returns the cached T(system) V(image) T(question) of every group."""
  ids, rows = actor.settings.system_reflect, prompts.ids.shape[0]
  inputs = {
    "system": _system(actor, ids, rows),
    "vision": features,
    "question": prompts.question,
  }
  lengths = {
    "system": _full(len(ids), rows),
    "question": prompts.question_length,
  }
  return _shared(
    actor, layouts.reflect(actor.settings.capacities), inputs, lengths, samples
  )


def refine_context(
  actor: actors.Actor,
  source: types.Latent,
  features: jax.Array,
  samples: int,
) -> Context:
  """Returns the cached A(image) V(image) of every group."""
  clean = network.Noised(source, jnp.zeros(source.shape[0], source.dtype))
  inputs = {"source": clean, "vision": features}
  return _shared(
    actor, layouts.refine(actor.settings.capacities), inputs, {}, samples
  )


def instruction_lengths(
  instruction: experience.Instruction,
) -> Mapping[str, types.Lengths]:
  return {
    "instruction": instruction.lengths,
    "instruction_alone": instruction.lengths,
  }

"""The cached part of every stage that a group shares (docs/algorithm.md#group-sharing).

The keys and values of the system prompt, the prompt and the source image are computed once per
group, and every sample of the group attends to them. T, V and A are text, ViT and VAE segments, see
docs/algorithm.md#sequences.
"""

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


@flax.struct.dataclass
class Context:
  """The part of a stage's sequence that a group shares.

  Attributes:
    cache: keys and values, a row per group.
    lengths: lengths of the shared text segments, repeated for every sample.
    layout: the stage's whole sequence.
  """

  cache: network.Cache  # [G, ...]
  lengths: Mapping[str, types.Lengths]  # [B]
  layout: segments.Layout = flax.struct.field(pytree_node=False)


def reason_context(
  actor: actors.Actor, prompts: experience.Prompts, samples_per_group: int
) -> Context:
  """Returns the cached T(system) T(prompt) of every group."""
  num_groups = prompts.ids.shape[0]
  system_ids = actor.settings.system_reason
  inputs = {
    "system": _system_segments(actor, system_ids, num_groups),
    "prompt": prompts.ids,
  }
  lengths = {
    "system": _equal_lengths(len(system_ids), num_groups),
    "prompt": prompts.length,
  }
  layout = layouts.reason(actor.settings.capacities)
  return _run_shared(actor, layout, inputs, lengths, samples_per_group)


def reflect_context(
  actor: actors.Actor,
  prompts: experience.Prompts,
  features: jax.Array,
  samples_per_group: int,
) -> Context:
  """Returns the cached T(system) V(image) T(question) of every group."""
  num_groups = prompts.ids.shape[0]
  system_ids = actor.settings.system_reflect
  inputs = {
    "system": _system_segments(actor, system_ids, num_groups),
    "siglip": features,
    "question": prompts.question,
  }
  lengths = {
    "system": _equal_lengths(len(system_ids), num_groups),
    "question": prompts.question_length,
  }
  layout = layouts.reflect(actor.settings.capacities)
  return _run_shared(actor, layout, inputs, lengths, samples_per_group)


def refine_context(
  actor: actors.Actor,
  source: types.Latent,
  features: jax.Array,
  samples_per_group: int,
) -> Context:
  """Returns the cached A(image) V(image) of every group."""
  # A clean image is a noised one at t = 0.
  clean = network.Noised(source, jnp.zeros(source.shape[0], source.dtype))
  inputs = {"source": clean, "siglip": features}
  layout = layouts.refine(actor.settings.capacities)
  return _run_shared(actor, layout, inputs, {}, samples_per_group)


def instruction_lengths(
  instruction: experience.Instruction,
) -> Mapping[str, types.Lengths]:
  """Returns the lengths of the refine stage's text segments, by name.

  The instruction occurs twice: after the source image, and alone for guidance without the image.
  """
  return {
    "instruction": instruction.lengths,
    "instruction_alone": instruction.lengths,
  }


def _run_shared(
  actor: actors.Actor,
  layout: segments.Layout,
  inputs: Mapping[str, jax.Array | network.Noised],
  lengths: Mapping[str, types.Lengths],
  samples_per_group: int,
) -> Context:
  # The cache keeps a row per group: each row serves all samples of its group.
  cache = actor.run(layout, inputs, lengths).cache
  lengths_by_sample = {
    name: jnp.repeat(length, samples_per_group)
    for name, length in lengths.items()
  }
  return Context(cache, lengths_by_sample, layout)


def _system_segments(
  actor: actors.Actor, ids: tuple[int, ...], num_rows: int
) -> types.TokenIds:
  """Returns the same system prompt in every row, padded."""
  # The segment has room for the longer one of the two system prompts.
  capacity = actor.settings.capacities.system
  padded = jnp.pad(jnp.array(ids, jnp.int32), (0, capacity - len(ids)))
  return jnp.broadcast_to(padded, (num_rows, capacity))


def _equal_lengths(length: int, num_rows: int) -> types.Lengths:
  return jnp.full(num_rows, length, jnp.int32)

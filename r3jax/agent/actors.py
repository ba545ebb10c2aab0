"""A policy at work: modules, parameters and settings, and the few calls that every stage makes."""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
from typing import cast

import jax
import jax.numpy as jnp

from r3jax import types
from r3jax.agent import rollout_settings
from r3jax.model import image_encoders
from r3jax.model import network
from r3jax.model import parameters
from r3jax.parallel import sharding
from r3jax.sampling import decoding
from r3jax.sequence import segments

# Slots of a text whose logits are in memory at a time; each has as many as the vocabulary has ids.
_LOGIT_SLOTS = 64


@dataclasses.dataclass(frozen=True)
class Modules:
  """The model without its parameters.

  Attributes:
    bagel: the half that is trained, with the sharding rules of training.
    towers: the frozen half, ViT and autoencoder.
    rollout_rules: where rollouts put parameters and activations.
  """

  bagel: network.Bagel
  towers: image_encoders.Towers
  rollout_rules: sharding.Rules = sharding.TRAIN


# Jitted so that it is traced once: rollout, loss and reference run the same segments.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(
  bagel: network.Bagel,
  layout: segments.Layout,
  policy: types.Params,
  inputs: Mapping[str, jax.Array | network.Noised],
  lengths: Mapping[str, types.Lengths],
  past: Sequence[network.Cache],
):
  return bagel.apply({"params": policy}, layout, inputs, lengths, past)


@dataclasses.dataclass(frozen=True)
class Actor:
  """A policy at work.

  Attributes:
    modules: the model.
    policy: parameters of the half that is trained.
    frozen: {"vision", "autoencoder"}, parameters of the frozen half.
    settings: how it samples.
  """

  modules: Modules
  policy: types.Params
  frozen: types.Params
  settings: rollout_settings.RolloutSettings

  def run(
    self,
    layout: segments.Layout,
    inputs: Mapping[str, jax.Array | network.Noised],
    lengths: Mapping[str, types.Lengths],
    past: Sequence[network.Cache] = (),
  ) -> network.Output:
    """Runs segments through the policy, see `Bagel.__call__`."""
    return _run(self.modules.bagel, layout, self.policy, inputs, lengths, past)

  def velocities(
    self, output: network.Output, names: tuple[str, ...]
  ) -> tuple[types.Latent, ...]:
    """Returns the velocities [B, N, C] of the named noise segments."""
    return tuple(
      self._read_out(output.latent(name), "velocity") for name in names
    )

  def logprob(self, hidden: types.Hidden, ids: types.TokenIds) -> jax.Array:
    """Returns the log-probs of ids[:, 1:], [B, T - 1], temperature 1.

    The logits of a long segment are computed for some of its slots at a time, in the backward pass
    too.

    Args:
      hidden: hidden states of a text segment.
      ids: tokens of the same segment.
    """
    # Slot j predicts token j + 1.
    hidden = hidden[:, :-1]
    ids = ids[:, 1:]

    @jax.checkpoint
    def part_logprob(hidden: types.Hidden, ids: types.TokenIds) -> jax.Array:
      return decoding.logprob(self._read_out(hidden, "logits"), ids)

    # Checkpointed, so that the backward pass does not keep the logits of all parts.
    parts = []
    for start in range(0, ids.shape[1], _LOGIT_SLOTS):
      slots = slice(start, start + _LOGIT_SLOTS)
      parts.append(part_logprob(hidden[:, slots], ids[:, slots]))
    return jnp.concatenate(parts, axis=1)

  def _read_out(self, hidden: types.Hidden, method: str) -> jax.Array:
    # `apply` returns variables, too, only if some of them are mutable.
    variables = {"params": self.policy}
    result = self.modules.bagel.apply(variables, hidden, method=method)
    return cast(jax.Array, result)


def sampler(
  modules: Modules,
  policy: types.Params,
  frozen: types.Params,
  settings: rollout_settings.RolloutSettings,
) -> Actor:
  """Returns an actor for rollouts; arguments are the attributes of `Actor`.

  Its weights are in the compute dtype and placed by the rules of rollouts: they are gathered once
  per rollout, and not once per token.
  """
  # Scoring keeps the rules of training: its weights are gathered layer by layer.
  bagel = modules.bagel.clone(rules=modules.rollout_rules)
  narrowed = parameters.narrowed(policy, bagel.dtype)
  placed = parameters.placed(bagel, narrowed)
  modules = dataclasses.replace(modules, bagel=bagel)
  return Actor(modules, placed, frozen, settings)

"""A policy at work: modules, parameters and settings, and the few calls that every stage makes."""

import dataclasses
import functools

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


# Compiled apart only to be traced once: the same segments run in rollout, loss and reference.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(
  bagel: network.Bagel,
  layout: segments.Layout,
  policy: types.Params,
  inputs,
  lengths,
  past,
):
  return bagel.apply({"params": policy}, layout, inputs, lengths, past)


_SLOTS = 64  # of a text whose logits exist at once


@dataclasses.dataclass(frozen=True)
class Actor:
  """A policy at work: modules, parameters and settings that every stage needs.

  Attributes:
    modules: the Linen modules.
    policy: trained parameters.
    frozen: {"vision", "autoencoder"} parameters.
    settings: how it samples.
  """

  modules: Modules
  policy: types.Params
  frozen: types.Params
  settings: rollout_settings.RolloutSettings

  def run(self, layout, inputs, lengths, past=()) -> network.Output:
    """Runs segments through the policy, see `Bagel.__call__`."""
    return _run(self.modules.bagel, layout, self.policy, inputs, lengths, past)

  def velocities(
    self, output: network.Output, names: tuple[str, ...]
  ) -> tuple[types.Latent, ...]:
    """Reads the velocities of the named noise segments."""
    return tuple(self._read(output.latent(name), "velocity") for name in names)

  def logprob(self, hidden: types.Hidden, ids: types.TokenIds) -> jax.Array:
    """Returns the log-probs of ids[:, 1:] given the hidden states of a text segment, [B, T - 1].

    The logits of a long segment exist for some of its slots at a time, in the backward pass too.
    """
    hidden, ids = hidden[:, :-1], ids[:, 1:]

    @jax.checkpoint
    def read(hidden, ids):
      return decoding.logprob(self._read(hidden, "logits"), ids)

    parts = [slice(at, at + _SLOTS) for at in range(0, ids.shape[1], _SLOTS)]
    return jnp.concatenate(
      [read(hidden[:, part], ids[:, part]) for part in parts], axis=1
    )

  def _read(self, hidden: types.Hidden, method: str) -> jax.Array:
    return self.modules.bagel.apply(
      {"params": self.policy}, hidden, method=method
    )


def sampler(
  modules: Modules,
  policy: types.Params,
  frozen: types.Params,
  settings,
) -> Actor:
  """Returns an actor for rollouts; takes what `Actor` takes.

  Its weights are in the compute dtype and where the rollouts' rules put them: gathered once, and
  not once per token.
  """
  bagel = modules.bagel.clone(rules=modules.rollout_rules)
  policy = parameters.placed(bagel, parameters.narrowed(policy, bagel.dtype))
  return Actor(
    dataclasses.replace(modules, bagel=bagel), policy, frozen, settings
  )

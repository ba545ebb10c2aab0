"""What an update changes, and the optimizer that changes it."""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
import optax

from r3jax import types


@flax.struct.dataclass
class TrainState:
  """Everything that training changes."""

  # trained parameters: all of the policy's, or the adapters alone
  policy: types.Params
  opt_state: optax.OptState  # moments, and the number of updates done
  step: jax.Array  # [] int32 iterations done


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
  """AdamW with clipping by the global norm.

  Attributes:
    und_learning_rate, gen_learning_rate: of the two experts; what only text uses (embeddings, head,
      connector) goes with und, what only latents use with gen.
    warmup_updates: the rate of update k (from 0) is min(1, k / warmup_updates) of the full one.
    b1, b2, eps, weight_decay: of AdamW.
    clip_norm: bound of the gradient's global norm.
    freeze_und: keep everything that goes with und.
  """

  und_learning_rate: float
  gen_learning_rate: float
  warmup_updates: int
  b1: float
  b2: float
  eps: float
  weight_decay: float
  clip_norm: float
  freeze_und: bool


_GEN_ONLY = ("vae2llm", "llm2vae", "time_embedder")


def expert_labels(policy: types.Params) -> types.Params:
  """Returns "und" or "gen" for every parameter."""

  def label(path, _):
    names = [part.key for part in path]
    return "gen" if "gen" in names or names[0] in _GEN_ONLY else "und"

  return jax.tree_util.tree_map_with_path(label, policy)


def learning_rate(rate: float, warmup_updates: int, update):
  """Returns the learning rate of an update, counted from 0: rate * min(1, update / warmup_updates)."""
  return (
    rate * jnp.minimum(1.0, update / max(warmup_updates, 1))
    if warmup_updates
    else rate
  )


def updates_done(opt_state: optax.OptState) -> jax.Array:
  """Returns how many updates an optimizer of `make_optimizer` has done, [] int32."""
  return optax.tree.get_all_with_path(opt_state, "count")[0][1]


def make_optimizer(settings: OptimizerSettings) -> optax.GradientTransformation:
  """Returns the optimizer; gradients must already be summed over replicas."""

  def adamw(rate: float) -> optax.GradientTransformation:
    warm = functools.partial(learning_rate, rate, settings.warmup_updates)
    # a number keeps no count in the state
    schedule = warm if settings.warmup_updates else rate
    return optax.adamw(
      schedule,
      settings.b1,
      settings.b2,
      settings.eps,
      weight_decay=settings.weight_decay,
    )

  und = (
    optax.set_to_zero()
    if settings.freeze_und
    else adamw(settings.und_learning_rate)
  )
  by_expert = {"und": und, "gen": adamw(settings.gen_learning_rate)}
  return optax.chain(
    optax.clip_by_global_norm(settings.clip_norm),
    optax.multi_transform(by_expert, expert_labels),
  )


def init_state(
  policy: types.Params, optimizer: optax.GradientTransformation
) -> TrainState:
  """Returns the state before the first iteration."""
  return TrainState(policy, optimizer.init(policy), jnp.int32(0))

"""What an update reads and changes, and its optimizer (docs/algorithm.md#update)."""

from collections.abc import Hashable
import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
import optax

from r3jax import types
from r3jax.model import low_rank
from r3jax.model import parameters


@flax.struct.dataclass
class TrainState:
  """Everything that training changes.

  Attributes:
    policy: trained parameters: all of the policy's, those of gen alone
      (`optimizer.freeze_und`), or the adapters alone.
    opt_state: moments, and the number of updates done.
    step: iterations done.
  """

  policy: types.Params
  opt_state: optax.OptState
  step: jax.Array  # [] int32


@flax.struct.dataclass
class Frozen:
  """Parameters that an iteration reads and never changes.

  Attributes:
    towers: {"vision", "autoencoder"}, the ViT and the autoencoder.
    reference: trained parameters of the policy that the KL is taken to: None
      where the objective has no KL, {} where the reference is `base` without
      adapters.
    base: what the policy has beside the trained parameters: what adapters
      belong to, or a frozen expert; None where all parameters are trained.
  """

  towers: types.Params
  reference: types.Params | None
  base: types.Params | None = None

  def whole(self, trained: types.Params) -> types.Params:
    """Returns the parameters that the modules run, given those that are trained."""
    return low_rank.join(self.base, trained)


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
  """AdamW (arXiv 1711.05101) with clipping by the global norm.

  Attributes:
    und_learning_rate, gen_learning_rate: full learning rates of the two
      experts; what only text uses (embeddings, head, connector) goes with und,
      what only latents use with gen.
    warmup_updates: the rate of update k (from 0) is min(1, k / warmup_updates)
      of the full one.
    b1, b2, eps, weight_decay: constants of AdamW.
    clip_norm: bound of the gradient's global norm.
    freeze_und: whether everything that goes with und stays as it is. It is
      then no trained parameter: neither gradients nor moments of it exist, and
      the norm that is clipped is that of gen.
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


def expert_labels(policy: types.Params) -> types.Params:
  """Returns a tree with "und" or "gen" in place of every parameter."""

  def label(path, _) -> str:
    return parameters.expert_of([part.key for part in path])

  return jax.tree_util.tree_map_with_path(label, policy)


def learning_rate(full_rate: float, warmup_updates: int, update):
  """Returns the learning rate of an update: full_rate * min(1, update / warmup_updates).

  Args:
    full_rate: rate after the warm-up.
    warmup_updates: length of the warm-up; 0 for none.
    update: number of the update, from 0; a number or an array.
  """
  if not warmup_updates:
    return full_rate
  return full_rate * jnp.minimum(1.0, update / warmup_updates)


def updates_done(opt_state: optax.OptState) -> jax.Array:
  """Returns how many updates an optimizer of `make_optimizer` has done, [] int32."""
  # The moments of each expert count; all counts agree.
  counts = optax.tree.get_all_with_path(opt_state, "count")
  _, first_count = counts[0]
  return first_count


def make_optimizer(settings: OptimizerSettings) -> optax.GradientTransformation:
  """Returns the optimizer of the trained parameters, which must not hold a frozen expert.

  Its gradients must already be sums over all replicas.
  """

  def adamw(full_rate: float) -> optax.GradientTransformation:
    # A schedule counts updates in the optimizer's state, a number does not.
    rate = full_rate
    if settings.warmup_updates:
      rate = functools.partial(
        learning_rate, full_rate, settings.warmup_updates
      )
    return optax.adamw(
      rate,
      settings.b1,
      settings.b2,
      settings.eps,
      weight_decay=settings.weight_decay,
    )

  by_expert: dict[Hashable, optax.GradientTransformation] = {
    "gen": adamw(settings.gen_learning_rate),
  }
  if not settings.freeze_und:
    by_expert["und"] = adamw(settings.und_learning_rate)
  # The norm that is clipped is that of the gradient of everything that is trained.
  return optax.chain(
    optax.clip_by_global_norm(settings.clip_norm),
    optax.multi_transform(by_expert, expert_labels),
  )

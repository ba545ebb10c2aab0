"""Minimises a loss over batches: the optimizer, one step, and the loop over steps."""

from collections.abc import Callable, Iterator
import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import optax

from r3jax import types
from r3jax.parallel import meshes
from r3jax.parallel import sharding

Metrics = dict[str, jax.Array]
# (params, batch, key) -> (value, metrics)
Loss = Callable[..., tuple[jax.Array, Metrics]]


@dataclasses.dataclass(frozen=True)
class Schedule:
  """How long and how fast a stage trains.

  Attributes:
    num_steps: updates.
    batch_size: examples of an update.
    learning_rate: its peak.
    warmup: updates over which it rises from 0.
  """

  num_steps: int
  batch_size: int
  learning_rate: float
  warmup: int

  def optimizer(self) -> optax.GradientTransformation:
    """Returns AdamW (0.9, 0.95) clipped at norm 1, with linear warm-up and cosine decay to 1 %."""
    rate = optax.warmup_cosine_decay_schedule(
      init_value=0.0,
      peak_value=self.learning_rate,
      warmup_steps=self.warmup,
      decay_steps=self.num_steps,
      end_value=self.learning_rate * 0.01,
    )
    return optax.chain(
      optax.clip_by_global_norm(1.0),
      optax.adamw(rate, 0.9, 0.95, weight_decay=0.0),
    )


@flax.struct.dataclass
class FitState:
  """What an update changes."""

  params: types.Params
  opt_state: optax.OptState
  step: jax.Array  # [] int32, number of updates done


# (number of updates done, state, metrics) -> whether to stop here
Watch = Callable[[int, FitState, Metrics], bool]


def begin(
  params: types.Params, optimizer: optax.GradientTransformation
) -> FitState:
  """Returns the state before the first update."""
  return FitState(params, optimizer.init(params), jnp.int32(0))


def fit(
  loss: Loss,
  state: FitState,
  optimizer: optax.GradientTransformation,
  batches: Iterator,
  seed: int,
  watch: Watch,
) -> FitState:
  """Minimises a loss over batches, which are split over all devices.

  Args:
    loss: returns the value to minimise and what to report.
    state: to start from; a later one goes on as if it had never stopped.
    optimizer: makes updates of gradients.
    batches: pytrees of arrays [B, ...], those that `state` has not seen.
    seed: seed of the loss's keys; update k has the key fold_in(key(seed), k).
    watch: called after every update.

  Returns:
    The state after the last batch, or where `watch` stopped.
  """

  @jax.jit
  def update(state: FitState, batch) -> tuple[FitState, Metrics]:
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    gradient = jax.value_and_grad(loss, has_aux=True)
    (_, metrics), gradients = gradient(state.params, batch, key)
    updates, opt_state = optimizer.update(
      gradients, state.opt_state, state.params
    )
    params = optax.apply_updates(state.params, updates)
    return FitState(params, opt_state, state.step + 1), metrics

  mesh = meshes.make_mesh(data=-1, fsdp=1, tensor=1)
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  number = int(state.step)
  state = jax.device_put(state, sharding.replicated(mesh))
  for batch in batches:
    state, metrics = update(state, jax.device_put(batch, rows))
    number += 1
    if watch(number, state, metrics):
      break
  return state

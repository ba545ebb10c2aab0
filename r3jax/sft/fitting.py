"""Minimises a loss over batches: the optimizer, one step, and the loop over steps."""

from collections.abc import Callable, Iterator
import dataclasses

from absl import logging
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
# (number of the step from 1, params, metrics)
Watch = Callable[[int, types.Params, Metrics], None]


@dataclasses.dataclass(frozen=True)
class Stage:
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


def fit(
  loss: Loss,
  params: types.Params,
  optimizer: optax.GradientTransformation,
  batches: Iterator,
  seed: int,
  watch: Watch,
) -> types.Params:
  """Minimises a loss over batches, which are split over all devices.

  Args:
    loss: returns the value to minimise and what to report.
    params: to start from.
    optimizer: makes updates of gradients.
    batches: pytrees of arrays [B, ...].
    seed: seed of the loss's keys; update k has the key fold_in(key(seed), k).
    watch: called after every update.

  Returns:
    The parameters after the last batch.
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
  params = jax.device_put(params, sharding.replicated(mesh))
  state = FitState(params, optimizer.init(params), jnp.int32(0))
  for number, batch in enumerate(batches, start=1):
    state, metrics = update(state, jax.device_put(batch, rows))
    watch(number, state.params, metrics)
  return state.params


def log_every(num_steps: int) -> Watch:
  """Returns a watch that logs the metrics of every `num_steps`-th step."""

  def watch(step: int, params: types.Params, metrics: Metrics) -> None:
    del params
    if step % num_steps == 0:
      values = [f"{name} {float(x):.4f}" for name, x in metrics.items()]
      logging.info("step %d: %s", step, ", ".join(values))

  return watch

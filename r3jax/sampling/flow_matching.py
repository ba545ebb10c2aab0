"""Flow matching: ODE, SDE and mixed trajectories, their log-probs and KL (R3.md section 6)."""

from collections.abc import Callable
import itertools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from r3jax import types
from r3jax.sampling import schedules

# velocity(latent [B, N, C], t [B], guided) -> [B, N, C]; `guided` is a Python bool
Velocity = Callable[[types.Latent, types.Time, bool], types.Latent]


def _wide(t: jax.Array) -> jax.Array:
  return t[:, None, None]


def ode_step(
  latent: types.Latent, velocity: types.Latent, dt: types.Time
) -> types.Latent:
  """Returns x - v dt."""
  return latent - velocity * _wide(dt)


def sde_moments(
  latent: types.Latent,
  velocity: types.Latent,
  t: types.Time,
  dt: types.Time,
  eta: types.Time,
) -> tuple[types.Latent, types.StepStd]:
  """Returns mean [B, N, C] and standard deviation [B, 1, 1] of one SDE step (Flow-GRPO).

  x0 = x - t v;  score = -(x - (1 - t) x0) / t^2
  mean = x - (v - eta^2 score / 2) dt;  std = eta sqrt(dt)
  """
  t, dt, eta = _wide(t), _wide(dt), _wide(eta)
  clean = latent - t * velocity
  score = -(latent - (1 - t) * clean) / t**2
  mean = latent - (velocity - 0.5 * eta**2 * score) * dt
  return mean, eta * jnp.sqrt(dt)


def token_logprob(
  next_latent: types.Latent, mean: types.Latent, std: types.StepStd
) -> jax.Array:
  """Returns -1/2 mean over channels of ((x' - mean) / std)^2, [B, N]; the normaliser is dropped."""
  return -0.5 * jnp.mean(((next_latent - mean) / std) ** 2, axis=-1)


def token_kl(
  mean: types.Latent, reference_mean: types.Latent, std: types.StepStd
) -> jax.Array:
  """Returns the mean over channels of ((mean - reference mean) / std)^2, [B, N] (no 1/2)."""
  return jnp.mean(((mean - reference_mean) / std) ** 2, axis=-1)


@flax.struct.dataclass
class SDEPlan:
  """Which step of each row's trajectory is stochastic, and its noise."""

  index: jax.Array  # [B] int32 first SDE step
  # step -> [B, N, C]
  noise: Callable[[jax.Array], types.Latent] = flax.struct.field(
    pytree_node=False
  )
  # SDE steps from `index` on
  steps: int = flax.struct.field(pytree_node=False, default=1)


@flax.struct.dataclass
class Trajectory:
  """What is kept of a sampled trajectory."""

  latent: types.Latent  # [B, N, C] at t = 0
  before: types.Latent  # [B, N, C] state before the (last) SDE step
  after: types.Latent  # [B, N, C] state after it
  t: types.Time  # [B] time of `before`
  dt: types.Time  # [B] length of that step
  # [B] mean over tokens of the step's log-prob
  behavior_logprob: types.PerSample


def _sde_update(
  state: Trajectory, velocity, t, dt, eta: schedules.Eta, noise, is_sde
) -> Trajectory:
  mean, std = sde_moments(state.latent, velocity, t, dt, eta(t))
  after = mean + std * noise
  keep = lambda new, old: jnp.where(
    is_sde.reshape(-1, *[1] * (new.ndim - 1)), new, old
  )
  return Trajectory(
    latent=keep(after, ode_step(state.latent, velocity, dt)),
    before=keep(state.latent, state.before),
    after=keep(after, state.after),
    t=keep(t, state.t),
    dt=keep(dt, state.dt),
    behavior_logprob=keep(
      token_logprob(after, mean, std).mean(-1), state.behavior_logprob
    ),
  )


def sample(
  velocity: Velocity,
  initial: types.Latent,
  schedule: schedules.Schedule,
  guided: np.ndarray,
  eta: schedules.Eta | None = None,
  plan: SDEPlan | None = None,
  on_step: Callable[[np.ndarray], None] | None = None,
) -> Trajectory:
  """Integrates the flow from noise to data.

  Without a plan every step is an ODE step; with one, `plan.steps` steps from `plan.index` on are
  SDE steps (Mix-GRPO: one). Consecutive steps that are all guided or all unguided share a loop,
  so unguided steps never compute the guidance branches.

  Args:
    velocity: the (guided) velocity.
    initial: [B, N, C] latent at t = 1.
    schedule: times.
    guided: [points - 1] bool, static; which steps are guided.
    eta: noise scale of the SDE steps; needed with a plan.
    plan: the SDE steps.
    on_step: called on the host with the number of every step that begins, for progress bars.

  Returns:
    The final latent and what is recorded of the SDE step (zeros without a plan).
  """
  times = jnp.asarray(schedule.times(), initial.dtype)
  rows = initial.shape[0]
  zeros = jnp.zeros(rows, initial.dtype)
  state = Trajectory(
    initial,
    jnp.zeros_like(initial),
    jnp.zeros_like(initial),
    zeros,
    zeros,
    zeros,
  )

  def advance(is_guided: bool, state: Trajectory, step: jax.Array):
    t = jnp.broadcast_to(times[step], (rows,))
    dt = jnp.broadcast_to(times[step] - times[step + 1], (rows,))
    if on_step is not None:
      jax.debug.callback(on_step, step)
    v = velocity(state.latent, t, is_guided)
    if plan is None:
      return state.replace(latent=ode_step(state.latent, v, dt)), None
    is_sde = (step >= plan.index) & (step < plan.index + plan.steps)
    return _sde_update(state, v, t, dt, eta, plan.noise(step), is_sde), None

  for is_guided, steps in itertools.groupby(
    range(schedule.num_steps), lambda i: bool(guided[i])
  ):
    advance_phase = lambda state, step, is_guided=is_guided: advance(
      is_guided, state, step
    )
    state, _ = jax.lax.scan(advance_phase, state, jnp.array(list(steps)))
  return state

"""Flow matching: ODE, SDE and mixed trajectories, their log-probs and KL.

See docs/algorithm.md#sampling-images; the SDE is that of Flow-GRPO (arXiv 2505.05470), mixed
trajectories are those of MixGRPO (arXiv 2507.21802).
"""

from collections.abc import Callable
import dataclasses
import functools
import itertools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from r3jax import types
from r3jax.sampling import schedules

# velocity(latent [B, N, C], t [B], is_guided) -> [B, N, C]; `is_guided` is a Python bool
Velocity = Callable[[types.Latent, types.Time, bool], types.Latent]


def _per_row(x: types.Time) -> jax.Array:
  """Returns [B, 1, 1], to be combined with latents."""
  return x[:, None, None]


def ode_step(
  latent: types.Latent, velocity: types.Latent, dt: types.Time
) -> types.Latent:
  """Returns the latent at t - dt: x - v dt."""
  return latent - velocity * _per_row(dt)


def sde_moments(
  latent: types.Latent,
  velocity: types.Latent,
  t: types.Time,
  dt: types.Time,
  eta: types.Time,
) -> tuple[types.Latent, types.StepStd]:
  """Returns the mean [B, N, C] and the standard deviation [B, 1, 1] of one SDE step.

    x₀ = x - t v
    s = -(x - (1 - t) x₀) / t²            (the score of the marginal at t)
    μ = x - (v - η² s / 2) dt
    σ = η √dt

  Source: docs/algorithm.md#sampling-images (Flow-GRPO, arXiv 2505.05470).

  Args:
    latent: x, [B, N, C] at t.
    velocity: v, [B, N, C].
    t: [B] in (0, 1], 1 is noise.
    dt: [B] length of the step, positive.
    eta: η, [B] noise scale at t.
  """
  t = _per_row(t)
  dt = _per_row(dt)
  eta = _per_row(eta)
  clean = latent - t * velocity
  scaled_noise = latent - (1 - t) * clean
  score = -scaled_noise / t**2
  drift = velocity - 0.5 * eta**2 * score
  mean = latent - drift * dt
  return mean, eta * jnp.sqrt(dt)


def token_logprob(
  next_latent: types.Latent, mean: types.Latent, std: types.StepStd
) -> jax.Array:
  """Returns the log-prob of every token of an SDE step, [B, N].

    -½ mean over channels of ((x' - μ) / σ)²

  The normalizer is dropped: it cancels in every ratio.
  """
  deviation = (next_latent - mean) / std
  return -0.5 * jnp.mean(deviation**2, axis=-1)


def token_kl(
  mean: types.Latent, reference_mean: types.Latent, std: types.StepStd
) -> jax.Array:
  """Returns the KL term of every token, [B, N]: mean over channels of ((μ - μ_ref) / σ)², no ½."""
  deviation = (mean - reference_mean) / std
  return jnp.mean(deviation**2, axis=-1)


@flax.struct.dataclass
class SDEPlan:
  """Which step of each row's trajectory is stochastic, and its noise.

  Attributes:
    index: the step.
    noise: step -> standard normal noise [B, N, C].
    eta: noise scale.
  """

  index: jax.Array  # [B] int32
  noise: Callable[[jax.Array], types.Latent] = flax.struct.field(
    pytree_node=False
  )
  eta: schedules.Eta = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Trajectory:
  """The end of a sampled trajectory, and its SDE step (zeros where there is none).

  Attributes:
    latent: at t = 0.
    before: latent that the SDE step starts from.
    after: latent that it ends at.
    t: time of `before`, in (0, 1].
    dt: length of the step.
    behavior_logprob: log-prob of the step, mean over tokens.
  """

  latent: types.Latent  # [B, N, C]
  before: types.Latent  # [B, N, C]
  after: types.Latent  # [B, N, C]
  t: types.Time  # [B]
  dt: types.Time  # [B]
  behavior_logprob: types.PerSample  # [B]


def _mixed_step(
  state: Trajectory,
  velocity: types.Latent,
  t: types.Time,
  dt: types.Time,
  plan: SDEPlan,
  step: jax.Array,
) -> Trajectory:
  """Advances the rows whose SDE step this is by that, the others by an ODE step."""
  eta = plan.eta(t)
  mean, std = sde_moments(state.latent, velocity, t, dt, eta)
  after = mean + std * plan.noise(step)
  with_sde = Trajectory(
    latent=after,
    before=state.latent,
    after=after,
    t=t,
    dt=dt,
    behavior_logprob=token_logprob(after, mean, std).mean(-1),
  )
  with_ode = dataclasses.replace(
    state, latent=ode_step(state.latent, velocity, dt)
  )
  is_sde = step == plan.index

  def select(sde: jax.Array, ode: jax.Array) -> jax.Array:
    shape = (-1,) + (1,) * (sde.ndim - 1)
    return jnp.where(is_sde.reshape(shape), sde, ode)

  return jax.tree.map(select, with_sde, with_ode)


def sample(
  velocity: Velocity,
  initial: types.Latent,
  schedule: schedules.Schedule,
  guided: np.ndarray,
  plan: SDEPlan | None = None,
) -> Trajectory:
  """Integrates the flow from noise to data.

  Without a plan every step is an ODE step; with one, each row has one SDE step (MixGRPO).
  Consecutive steps that are all guided or all unguided share a loop, so that unguided steps never
  compute the guidance branches.

  Args:
    velocity: the (guided) velocity.
    initial: [B, N, C] latent at t = 1.
    schedule: times.
    guided: [points - 1] bool, static; which steps are guided.
    plan: the SDE steps.

  Returns:
    The final latent, and the recorded SDE step.
  """
  times = jnp.asarray(schedule.times(), initial.dtype)
  rows = initial.shape[0]

  def advance(is_guided: bool, state: Trajectory, step: jax.Array):
    t = jnp.broadcast_to(times[step], (rows,))
    step_length = times[step] - times[step + 1]
    dt = jnp.broadcast_to(step_length, (rows,))
    v = velocity(state.latent, t, is_guided)
    if plan is None:
      next_latent = ode_step(state.latent, v, dt)
      return dataclasses.replace(state, latent=next_latent), None
    return _mixed_step(state, v, t, dt, plan, step), None

  state = Trajectory(
    latent=initial,
    before=jnp.zeros_like(initial),
    after=jnp.zeros_like(initial),
    t=jnp.zeros(rows, initial.dtype),
    dt=jnp.zeros(rows, initial.dtype),
    behavior_logprob=jnp.zeros(rows, initial.dtype),
  )
  phases = itertools.groupby(
    range(schedule.num_steps), key=lambda step: bool(guided[step])
  )
  for is_guided, steps in phases:
    advance_phase = functools.partial(advance, is_guided)
    state, _ = jax.lax.scan(advance_phase, state, jnp.array(list(steps)))
  return state

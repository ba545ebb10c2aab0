"""Tests of flow sampling against the golden trajectories (cases g and h) and closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r3jax.sampling import flow as flow_lib
from r3jax.sampling import guidance as guidance_lib
from r3jax.sampling import schedule as schedule_lib
from tests import goldens_lib

ROWS = 2
ODE = ("g_ode_gen", "g_ode_edit")
MIX = ("h_mix_gen", "h_mix_edit")
MATH = "h_sde_math"


def _schedule(points: int) -> schedule_lib.Schedule:
  return schedule_lib.Schedule(points, goldens_lib.constants()["timestep_shift"])


def _initial(name: str) -> jax.Array:
  noise = jnp.asarray(goldens_lib.case(name)["initial_noise"])
  return jnp.broadcast_to(noise, (ROWS, *noise.shape))


def _guided(guidance: guidance_lib.Guidance, schedule: schedule_lib.Schedule) -> np.ndarray:
  return np.array([guidance.active(t) for t in schedule.times()[:-1]], bool)


def _packed(x: jax.Array) -> np.ndarray:
  return np.asarray(x).reshape(-1, x.shape[-1])


@functools.partial(
    jax.jit, static_argnames=("layout", "noise", "guidance", "schedule", "interval", "eta")
)
def _sample(
    policy,
    initial,
    lengths,
    past,
    index,
    sde_noise,
    *,
    layout,
    noise,
    guidance,
    schedule,
    interval,
    eta,
):
  """Samples a golden scene; `sde_noise` [B, N, C] or None is the noise of every SDE step."""
  guidance = guidance_lib.Guidance(
      guidance.text_scale, guidance.image_scale, guidance.renorm, interval=interval
  )
  names = noise[: 1 + guidance.uses_text + guidance.uses_image]

  def velocity(latent, t, guided):
    found = goldens_lib.velocities(
        policy, layout, names if guided else names[:1], latent, t, lengths, past
    )
    return guidance_lib.combine(guidance, *found) if guided else found[0]

  plan = None if sde_noise is None else flow_lib.SDEPlan(index, lambda step: sde_noise)
  return flow_lib.sample(velocity, initial, schedule, _guided(guidance, schedule), eta, plan)


def _run(name, *, interval=(0.4, 1.0), index=None, sde_noise=None, eta=None) -> flow_lib.Trajectory:
  scene = goldens_lib.scene(name)
  return _sample(
      goldens_lib.weights()["policy"],
      _initial(name),
      scene.lengths,
      scene.past,
      index,
      sde_noise,
      layout=scene.layout,
      noise=scene.noise,
      guidance=scene.guidance,
      schedule=_schedule(goldens_lib.constants()["ode_points"]),
      interval=interval,
      eta=eta,
  )


class TestSample:

  @pytest.mark.parametrize("name", ODE)
  def test_every_step_equals_golden(self, name):
    scene = goldens_lib.scene(name)
    schedule = _schedule(len(goldens_lib.case(name)["timesteps"]))
    times, guided = schedule.times(), _guided(scene.guidance, schedule)
    goldens_lib.assert_close(name, "timesteps", times)
    goldens_lib.assert_close(name, "cfg_active", guided)
    latent, latents, velocities = _initial(name), [], []
    for t, following, is_guided in zip(times, times[1:], guided):
      branches = scene.branches(latent, t)[: 2 + scene.guidance.uses_image]
      v = guidance_lib.combine(scene.guidance, *branches) if is_guided else branches[0]
      latents.append(_packed(latent))
      velocities.append(_packed(v))
      latent = flow_lib.ode_step(latent, v, jnp.full(ROWS, t - following))
    goldens_lib.assert_close(name, "x_traj", np.stack(latents))
    goldens_lib.assert_close(name, "v_traj", np.stack(velocities))
    goldens_lib.assert_close(name, "x_final", _packed(latent))

  @pytest.mark.parametrize("name", ODE)
  def test_ode_equals_golden(self, name):
    latent = _run(name).latent
    goldens_lib.assert_close(name, "x_final", _packed(latent))
    size = goldens_lib.scene(name).size
    goldens_lib.assert_close(name, "image_uint8", goldens_lib.decode_images(latent, size))

  @pytest.mark.parametrize("name", ODE)
  def test_ode_equals_golden_for_an_inner_interval(self, name):
    interval = tuple(float(x) for x in goldens_lib.case(name)["interval2"])
    guidance = guidance_lib.Guidance(2.0, 1.0, "global", interval=interval)
    active = _guided(guidance, _schedule(goldens_lib.constants()["ode_points"]))
    goldens_lib.assert_close(name, "interval2_cfg_active", active)
    assert active.any() and not active.all()
    latent = _run(name, interval=interval).latent
    goldens_lib.assert_close(name, "interval2_x_final", _packed(latent))

  @pytest.mark.parametrize("name", MIX)
  def test_one_sde_step_equals_golden(self, name):
    arrays = goldens_lib.case(name)
    index = jnp.full(ROWS, int(arrays["sde_idx"][0]))
    noise = goldens_lib.rows_of(arrays["sde_noise"])
    eta = schedule_lib.Eta("monotonic", float(arrays["constant_eta"]))
    found = _run(name, index=index, sde_noise=noise, eta=eta)
    goldens_lib.assert_close(name, "timestep", found.t[:1])
    goldens_lib.assert_close(name, "dt", found.dt[:1])
    goldens_lib.assert_close(name, "x_final", _packed(found.latent))
    logprob = [arrays[f"log_prob_{row}"].mean() for row in range(ROWS)]
    np.testing.assert_allclose(found.behavior_logprob, logprob, atol=1e-5, rtol=0)
    scene = goldens_lib.scene(name)
    branches = scene.branches(found.before, found.t[0])[: 2 + scene.guidance.uses_image]
    velocity = guidance_lib.combine(scene.guidance, *branches)
    goldens_lib.assert_close(name, "v_sde_step", _packed(velocity))
    mean, std = flow_lib.sde_moments(found.before, velocity, found.t, found.dt, eta(found.t))
    tokens = flow_lib.token_logprob(found.after, mean, std)
    for row in range(ROWS):
      states = jnp.stack([found.before[row], found.after[row]])
      goldens_lib.assert_close(name, f"latents_{row}", states)
      goldens_lib.assert_close(name, f"log_prob_{row}", tokens[row : row + 1])


def _shrink(latent, t, guided):
  """A velocity that is known everywhere: twice the latent, plus the time."""
  del guided
  return 2 * latent + t[:, None, None]


POINTS = 5
INITIAL = np.random.default_rng(0).normal(size=(3, 2, 4)).astype(np.float32)
NOISE = np.random.default_rng(1).normal(size=(POINTS - 1, 3, 2, 4)).astype(np.float32)


def _known(eta: schedule_lib.Eta | None = None, index=None, steps: int = 1) -> flow_lib.Trajectory:
  plan = None
  if index is not None:
    plan = flow_lib.SDEPlan(jnp.asarray(index), lambda step: jnp.asarray(NOISE)[step], steps)
  schedule = schedule_lib.Schedule(POINTS)
  guided = np.array([True, False, False, True])
  return flow_lib.sample(_shrink, jnp.asarray(INITIAL), schedule, guided, eta, plan)


def _euler() -> list[np.ndarray]:
  times, states = schedule_lib.Schedule(POINTS).times(), [INITIAL.astype(np.float64)]
  for t, following in zip(times, times[1:]):
    states.append(states[-1] - (2 * states[-1] + t) * (t - following))
  return states


class TestSampleOfAKnownVelocity:

  def test_is_euler_without_a_plan(self):
    np.testing.assert_allclose(_known().latent, _euler()[-1], atol=1e-5)

  def test_equals_ode_for_a_tiny_eta(self):
    tiny = _known(schedule_lib.Eta("constant", 1e-6), index=[0, 1, 3])
    np.testing.assert_allclose(tiny.latent, _euler()[-1], atol=1e-5)

  def test_records_each_rows_own_step(self):
    index = [0, 1, 3]
    found = _known(schedule_lib.Eta("constant", 0.5), index=index)
    times, states = schedule_lib.Schedule(POINTS).times(), _euler()
    np.testing.assert_allclose(found.t, times[index], rtol=1e-6)
    np.testing.assert_allclose(found.dt, (times[:-1] - times[1:])[index], rtol=1e-6)
    for row, step in enumerate(index):
      np.testing.assert_allclose(found.before[row], states[step][row], atol=1e-5)
      noise = NOISE[step, row]
      logprob = (-0.5 * noise**2).mean()  # (after - mean) / std is the noise
      np.testing.assert_allclose(found.behavior_logprob[row], logprob, rtol=1e-4)

  def test_steps_after_the_sde_step_are_ode(self):
    found = _known(schedule_lib.Eta("constant", 0.5), index=[POINTS - 2] * 3)
    np.testing.assert_array_equal(found.latent, found.after)
    earlier = _known(schedule_lib.Eta("constant", 0.5), index=[POINTS - 3] * 3)
    t = schedule_lib.Schedule(POINTS).times()[-2]
    last = np.asarray(earlier.after) * (1 - 2 * t) - t * t
    np.testing.assert_allclose(earlier.latent, last, atol=1e-5)

  def test_records_the_last_of_several_sde_steps(self):
    found = _known(schedule_lib.Eta("constant", 0.5), index=[1] * 3, steps=2)
    np.testing.assert_allclose(found.t, schedule_lib.Schedule(POINTS).times()[[2] * 3], rtol=1e-6)

  def test_records_zeros_without_a_plan(self):
    found = _known()
    assert not np.any(found.before) and not np.any(found.t) and not np.any(found.behavior_logprob)


def _math_eta(mode: int, scale: float) -> schedule_lib.Eta:
  return schedule_lib.Eta(("constant", "monotonic")[mode], float(scale))


class TestSdeMoments:

  def test_equals_golden_with_logprob_and_kl(self):
    arrays = goldens_lib.case(MATH)
    x, v, v_ref, x_next = (
        jnp.asarray(arrays[name])[None] for name in ("x_t", "v", "v_ref", "x_prev")
    )
    found = {name: [] for name in ("eta", "std", "mean", "log_prob", "kl")}
    cases = zip(*(arrays[name] for name in ("t", "dt", "eta_mode", "eta_scale")))
    for t, dt, mode, scale in cases:
      t, dt = jnp.asarray([t]), jnp.asarray([dt])
      eta = _math_eta(mode, scale)(t)
      mean, std = flow_lib.sde_moments(x, v, t, dt, eta)
      reference_mean, _ = flow_lib.sde_moments(x, v_ref, t, dt, eta)
      logprob, kl = flow_lib.token_logprob(x_next, mean, std), flow_lib.token_kl(
          mean, reference_mean, std
      )
      for name, value in zip(found, (eta, std[:, 0, 0], mean, logprob, kl)):
        found[name].append(np.asarray(value)[0])
    for name, values in found.items():
      goldens_lib.assert_close(MATH, name, np.stack(values))

  def test_equals_golden_for_a_time_per_row(self):
    arrays = goldens_lib.case(MATH)
    x, v, x_next = (jnp.asarray(arrays[name])[:, None] for name in ("x_t", "v", "x_prev"))
    t, dt = jnp.asarray(arrays["vec_t"]), jnp.asarray(arrays["vec_dt"])
    mean, std = flow_lib.sde_moments(x, v, t, dt, schedule_lib.Eta("monotonic", 0.7)(t))
    goldens_lib.assert_close(MATH, "vec_mean", mean[:, 0])
    goldens_lib.assert_close(MATH, "vec_std", std[:, 0])
    goldens_lib.assert_close(MATH, "vec_log_prob", flow_lib.token_logprob(x_next, mean, std)[:, 0])

  def test_equals_the_ode_step_at_eta_zero(self):
    x, v = jax.random.normal(jax.random.key(0), (2, 1, 3, 4))
    t, dt = jnp.array([0.6]), jnp.array([0.1])
    mean, std = flow_lib.sde_moments(x, v, t, dt, jnp.zeros(1))
    np.testing.assert_allclose(mean, flow_lib.ode_step(x, v, dt), atol=1e-6)
    np.testing.assert_array_equal(std, np.zeros((1, 1, 1)))


class TestSchedule:

  @pytest.mark.parametrize("points", [16, 21])
  def test_equals_golden(self, points):
    times = _schedule(points).times()
    goldens_lib.assert_close(MATH, f"schedule{points}_t", times[:-1])
    goldens_lib.assert_close(MATH, f"schedule{points}_dt", times[:-1] - times[1:])

  @pytest.mark.parametrize("shift", [1.0, 3.0])
  def test_runs_from_1_down_to_0(self, shift):
    times = schedule_lib.Schedule(7, shift).times()
    assert times[0] == 1 and times[-1] == 0 and (np.diff(times) < 0).all()

  def test_refuses_a_single_point(self):
    with pytest.raises(ValueError, match="at least 2 points; got 1"):
      schedule_lib.Schedule(1)


class TestEta:

  def test_is_bounded_at_the_start(self):
    eta = schedule_lib.Eta("monotonic", 0.7)(jnp.array([1.0, 0.5]))
    np.testing.assert_allclose(eta, [0.7 * 20**0.5, 0.7], rtol=1e-5)

  def test_refuses_an_unknown_mode(self):
    with pytest.raises(ValueError, match="got 'linear'"):
      schedule_lib.Eta("linear", 1.0)

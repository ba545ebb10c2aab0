"""Tests of flow sampling against closed forms; golden trajectories: tests/parity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r3jax.sampling import flow_matching
from r3jax.sampling import schedules


def _shrink(latent, t, guided):
  """A velocity that is known everywhere: twice the latent, plus the time."""
  del guided
  return 2 * latent + t[:, None, None]


POINTS = 5
INITIAL = np.random.default_rng(0).normal(size=(3, 2, 4)).astype(np.float32)
NOISE = (
  np.random.default_rng(1).normal(size=(POINTS - 1, 3, 2, 4)).astype(np.float32)
)


def _known(
  eta: schedules.Eta | None = None, index=None
) -> flow_matching.Trajectory:
  plan = None
  if index is not None:
    plan = flow_matching.SDEPlan(
      jnp.asarray(index), lambda step: jnp.asarray(NOISE)[step], eta
    )
  schedule = schedules.Schedule(POINTS)
  guided = np.array([True, False, False, True])
  return flow_matching.sample(
    _shrink, jnp.asarray(INITIAL), schedule, guided, plan
  )


def _euler() -> list[np.ndarray]:
  times, states = (
    schedules.Schedule(POINTS).times(),
    [INITIAL.astype(np.float64)],
  )
  for t, following in zip(times, times[1:]):
    states.append(states[-1] - (2 * states[-1] + t) * (t - following))
  return states


class TestSampleOfAKnownVelocity:
  def test_is_euler_without_a_plan(self):
    np.testing.assert_allclose(_known().latent, _euler()[-1], atol=1e-5)

  def test_equals_ode_for_a_tiny_eta(self):
    tiny = _known(schedules.Eta("constant", 1e-6), index=[0, 1, 3])
    np.testing.assert_allclose(tiny.latent, _euler()[-1], atol=1e-5)

  def test_records_each_rows_own_step(self):
    index = [0, 1, 3]
    found = _known(schedules.Eta("constant", 0.5), index=index)
    times, states = schedules.Schedule(POINTS).times(), _euler()
    np.testing.assert_allclose(found.t, times[index], rtol=1e-6)
    np.testing.assert_allclose(
      found.dt, (times[:-1] - times[1:])[index], rtol=1e-6
    )
    for row, step in enumerate(index):
      np.testing.assert_allclose(
        found.before[row], states[step][row], atol=1e-5
      )
      noise = NOISE[step, row]
      logprob = (-0.5 * noise**2).mean()  # (after - mean) / std is the noise
      np.testing.assert_allclose(
        found.behavior_logprob[row], logprob, rtol=1e-4
      )

  def test_steps_after_the_sde_step_are_ode(self):
    found = _known(schedules.Eta("constant", 0.5), index=[POINTS - 2] * 3)
    np.testing.assert_array_equal(found.latent, found.after)
    earlier = _known(schedules.Eta("constant", 0.5), index=[POINTS - 3] * 3)
    t = schedules.Schedule(POINTS).times()[-2]
    last = np.asarray(earlier.after) * (1 - 2 * t) - t * t
    np.testing.assert_allclose(earlier.latent, last, atol=1e-5)

  def test_records_zeros_without_a_plan(self):
    found = _known()
    assert (
      not np.any(found.before)
      and not np.any(found.t)
      and not np.any(found.behavior_logprob)
    )


class TestSdeMoments:
  def test_equals_the_ode_step_at_eta_zero(self):
    x, v = jax.random.normal(jax.random.key(0), (2, 1, 3, 4))
    t, dt = jnp.array([0.6]), jnp.array([0.1])
    mean, std = flow_matching.sde_moments(x, v, t, dt, jnp.zeros(1))
    np.testing.assert_allclose(
      mean, flow_matching.ode_step(x, v, dt), atol=1e-6
    )
    np.testing.assert_array_equal(std, np.zeros((1, 1, 1)))


class TestSchedule:
  @pytest.mark.parametrize("shift", [1.0, 3.0])
  def test_runs_from_1_down_to_0(self, shift):
    times = schedules.Schedule(7, shift).times()
    assert times[0] == 1 and times[-1] == 0 and (np.diff(times) < 0).all()

  def test_refuses_a_single_point(self):
    with pytest.raises(ValueError, match="at least 2 points; got 1"):
      schedules.Schedule(1)


class TestEta:
  def test_is_bounded_at_the_start(self):
    eta = schedules.Eta("monotonic", 0.7)(jnp.array([1.0, 0.5]))
    np.testing.assert_allclose(eta, [0.7 * 20**0.5, 0.7], rtol=1e-5)

  def test_refuses_an_unknown_mode(self):
    with pytest.raises(ValueError, match="got 'linear'"):
      schedules.Eta("linear", 1.0)

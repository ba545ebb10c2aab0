"""Tests of guidance: its branches in one pass, closed forms; golden velocities: tests/parity."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r3jax.agent import rollout_settings
from r3jax.sampling import classifier_free
from r3jax.sampling import schedules
from tests import goldens_lib

GEN, EDIT = "f_flow_gen", "f_flow_edit"


class TestBranches:
  """Velocities of the noise segments, before they are combined."""

  @pytest.mark.parametrize("name", [GEN, EDIT])
  def test_in_one_pass_equal_separate_passes(self, name):
    scene, arrays = goldens_lib.scene(name), goldens_lib.case(name)
    latent = goldens_lib.rows_of(arrays["x_t"], scene.rows)
    together = scene.branches(latent, float(arrays["t"]))
    for i, noise in enumerate(scene.noise[1:], 1):
      (alone,) = dataclasses.replace(scene, noise=(noise,)).branches(
        latent, float(arrays["t"])
      )
      np.testing.assert_allclose(together[i], alone, atol=1e-5, rtol=0)


class TestCombine:
  def test_shrinks_to_the_norm_of_the_conditional_velocity(self):
    v, u = jnp.array([[[3.0, 0.0], [0.0, 4.0]]]), jnp.zeros((1, 2, 2))
    for renorm in ("global", "channel", "text_channel"):
      found = classifier_free.combine(
        classifier_free.Guidance(4.0, 1.0, renorm), v, u
      )
      np.testing.assert_allclose(found, v, rtol=1e-6)  # 4 v shrunk to |v|

  def test_never_stretches(self):
    v, u = jnp.array([[[4.0, 0.0]]]), jnp.array([[[6.0, 0.0]]])
    found = classifier_free.combine(
      classifier_free.Guidance(2.0, 1.0, "channel"), v, u
    )
    np.testing.assert_allclose(found, [[[2.0, 0.0]]], rtol=1e-6)

  def test_is_finite_where_everything_is_zero(self):
    zeros = jnp.zeros((1, 2, 2))
    found = classifier_free.combine(
      classifier_free.Guidance(4.0, 1.0, "global"), zeros, zeros
    )
    np.testing.assert_array_equal(found, zeros)

  def test_gradient_is_finite_where_everything_is_zero(self):
    guidance = classifier_free.Guidance(4.0, 1.0, "global")
    zeros = jnp.zeros((1, 2, 2))

    def energy(v):
      return jnp.sum(classifier_free.combine(guidance, v, zeros))

    assert bool(jnp.isfinite(jax.grad(energy)(jnp.zeros((1, 2, 2)))).all())


class TestCombineWhereActive:
  def test_leaves_rows_outside_the_interval(self):
    guidance = classifier_free.Guidance(
      4.0, 1.0, "channel", interval=(0.4, 0.9)
    )
    v, u = jax.random.normal(jax.random.key(0), (2, 4, 3, 5))
    t = jnp.array([0.4, 0.41, 0.9, 1.0])
    found = classifier_free.combine_where_active(guidance, t, (v, u))
    guided = classifier_free.combine(guidance, v, u)
    np.testing.assert_array_equal(
      found, jnp.stack([v[0], guided[1], guided[2], v[3]])
    )


class TestGuidance:
  def test_does_nothing_at_text_scale_1(self):
    guidance = classifier_free.Guidance(1.0, 1.5, "global")
    assert not guidance.uses_text and not guidance.uses_image
    assert not guidance.active(np.array(0.9))
    flow = rollout_settings.FlowSettings(
      schedules.Schedule(4), guidance, schedules.Eta("constant", 1.0), 0
    )
    names = flow.branches(goldens_lib.edit_scene(EDIT).noise)
    assert names == ("edit",)

  @pytest.mark.parametrize("points", [56, 111, 188])
  def test_sampling_and_loss_agree_at_the_bound(self, points):
    """One time of these schedules is 0.4, in float64 sometimes a rounding above it."""
    guidance = classifier_free.Guidance(4.0, 1.0, "global", interval=(0.4, 1.0))
    schedule = schedules.Schedule(points)
    flow = rollout_settings.FlowSettings(
      schedule, guidance, schedules.Eta("constant", 1.0), 0
    )
    starts = schedule.times()[:-1]
    assert np.isclose(starts, 0.4, rtol=0, atol=1e-12).sum() == 1
    in_loss = guidance.active(jnp.asarray(starts, jnp.float32))
    np.testing.assert_array_equal(flow.guided, in_loss)
    np.testing.assert_array_equal(flow.guided, starts > 0.4 + 1e-6)

  def test_refuses_an_unknown_renorm(self):
    with pytest.raises(ValueError, match="got 'none'"):
      classifier_free.Guidance(4.0, 1.0, "none")

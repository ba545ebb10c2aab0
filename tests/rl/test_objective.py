"""Tests of the objective's terms by hand, and of on-policy ratios on the golden packs.

Scoring passes, losses and gradients against the recorded numbers: tests/parity.
"""

import jax
import jax.numpy as jnp
import numpy as np

from r3jax.agent import experience
from r3jax.agent import rollout_settings
from r3jax.rl import iteration_settings
from r3jax.rl import objective
from r3jax.sampling import classifier_free
from r3jax.sampling import flow_matching
from r3jax.sampling import schedules

TEXT = experience.Text(
  ids=jnp.zeros((2, 4), jnp.int32),
  lengths=jnp.array([4, 3]),
  behavior_logprob=jnp.full((2, 3), -1.0),
)


class TestTextTerms:
  def test_sums_over_scored_tokens_of_valid_samples(self):
    # 9: begin and end side, unscored
    logprob = jnp.array([[-1.0, -0.5, 9.0], [-2.0, 9.0, 9.0]])
    found = objective.text_terms(
      logprob,
      logprob - 1,
      TEXT,
      jnp.array([1.0, 2.0]),
      jnp.array([True, True]),
      0.2,
    )
    np.testing.assert_allclose(
      found.policy, -1 - 1.2 - 2 * np.exp(-1), rtol=1e-5
    )
    np.testing.assert_allclose(found.kl, 3 * np.exp(-1), rtol=1e-5)
    assert (int(found.num_tokens), int(found.num_clipped)) == (3, 2)
    np.testing.assert_allclose(found.mismatch, np.exp(0.5) - 1, rtol=1e-5)
    np.testing.assert_allclose(
      found.ratio, 1 + np.exp(0.5) + np.exp(-1), rtol=1e-5
    )
    np.testing.assert_allclose(found.entropy, 3, rtol=1e-6)

  def test_leaves_invalid_samples_out(self):
    logprob = jnp.array([[-1.0, -1.0, 9.0], [jnp.nan, jnp.nan, 9.0]])
    found = objective.text_terms(
      logprob,
      logprob,
      TEXT,
      jnp.array([1.0, 2.0]),
      jnp.array([True, False]),
      0.2,
    )
    np.testing.assert_allclose(found.policy, -2, rtol=1e-6)
    assert int(found.num_tokens) == 2 and float(found.kl) == 0

  def test_gradient_is_finite_for_an_invalid_sample(self):
    logprob = jnp.array([[-1.0, -1.0, 0.0], [-200.0, -200.0, 0.0]])
    valid = jnp.array([True, False])

    def loss(x):
      terms = objective.text_terms(
        x, jnp.zeros_like(x), TEXT, jnp.ones(2), valid, 0.2
      )
      return terms.policy + terms.kl

    gradient = jax.grad(loss)(logprob)
    assert bool(jnp.isfinite(gradient).all()) and not np.any(gradient[1])

  def test_keeps_and_counts_an_extreme_kl(self):
    logprob = jnp.array([[-1.0, -4.0, 0.0], [-1.0, 0.0, 0.0]])
    found = objective.text_terms(
      logprob, jnp.full((2, 3), -1.0), TEXT, jnp.ones(2), jnp.ones(2, bool), 0.2
    )
    np.testing.assert_allclose(found.kl, np.exp(3) - 4, rtol=1e-5)
    assert int(found.num_extreme_kl) == 1


class TestFlowTerms:
  def test_measures_and_clips_image_ratios_by_their_own_range(self):
    """The recorded log-probs are set so that ratios are 1.01, 0.97 and (left out) 2."""
    before = jax.random.normal(jax.random.key(0), (3, 3, 4))
    velocity = jax.random.normal(jax.random.key(1), (3, 3, 4))
    after = jax.random.normal(jax.random.key(2), (3, 3, 4))
    t = jnp.full(3, 0.8)
    dt = jnp.full(3, 0.1)
    flow = rollout_settings.FlowSettings(
      schedules.Schedule(4),
      classifier_free.Guidance(1.0, 1.0, "global"),
      schedules.Eta("constant", 0.7),
      1,
    )
    mean, std = flow_matching.sde_moments(before, velocity, t, dt, flow.eta(t))
    logprob = flow_matching.token_logprob(after, mean, std).mean(axis=-1)
    ratio = jnp.array([1.01, 0.97, 2.0])
    trajectory = flow_matching.Trajectory(
      after, before, after, t, dt, logprob - jnp.log(ratio)
    )

    def terms(clip_range):
      return objective.flow_terms(
        velocity,
        velocity,
        trajectory,
        flow,
        jnp.array([1.0, -1.0, 1.0]),
        jnp.array([True, True, False]),
        clip_range,
      )

    wide = terms(0.2)
    np.testing.assert_allclose(wide.policy, -1.01 + 0.97, atol=1e-5)
    np.testing.assert_allclose(wide.deviation, 0.01 + 0.03, atol=1e-5)
    np.testing.assert_allclose(wide.mismatch, 0.03, atol=1e-5)
    assert int(wide.num_clipped) == 0
    narrow = terms(0.02)
    np.testing.assert_allclose(narrow.policy, -1.01 + 0.98, atol=1e-5)
    assert int(narrow.num_clipped) == 1

  def test_are_zero_with_a_zero_gradient_for_a_stage_without_sde(self):
    """Such a rollout records zeros: a step at time 0 has neither mean nor standard deviation."""
    zeros = jnp.zeros((2, 3, 4))
    trajectory = flow_matching.Trajectory(
      zeros, zeros, zeros, *[jnp.zeros(2)] * 3
    )
    flow = rollout_settings.FlowSettings(
      schedules.Schedule(4),
      classifier_free.Guidance(1.0, 1.0, "global"),
      schedules.Eta("monotonic", 0.7),
      0,
    )
    loss = iteration_settings.LossSettings(
      1.0, 2.0, 0.001, 0.001, 0.2, 0.2, False, 1.0
    )

    def value(velocity):
      terms = objective.flow_terms(
        velocity,
        zeros,
        trajectory,
        flow,
        jnp.ones(2),
        jnp.ones(2, bool),
        loss.image_clip_range,
      )
      text = objective.text_terms(
        jnp.zeros((2, 3)),
        jnp.zeros((2, 3)),
        TEXT,
        jnp.zeros(2),
        jnp.zeros(2, bool),
        0.2,
      )
      return objective.total(
        text, terms, text.num_tokens, terms.num_images, loss
      ), terms

    (total, terms), gradient = jax.value_and_grad(value, has_aux=True)(
      jnp.ones((2, 3, 4))
    )
    assert float(total) == 0 and int(terms.num_images) == 0
    np.testing.assert_array_equal(gradient, zeros)

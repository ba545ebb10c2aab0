"""Tests of the loss terms against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from r3jax.rl import losses


class TestClippedPolicy:
  def test_clips_only_what_would_gain(self):
    ratio = jnp.array([1.5, 1.5, 0.5, 0.5, 1.1, 0.9])
    advantage = jnp.array([2.0, -2.0, 2.0, -2.0, 3.0, -3.0])
    found = losses.clipped_policy(jnp.log(ratio), advantage, 0.2)
    np.testing.assert_allclose(
      found, [-2.4, 3.0, -1.0, 1.6, -3.3, 2.7], rtol=1e-6
    )

  def test_gradient_is_minus_the_advantage_on_policy(self):
    gradient = jax.grad(
      lambda x: losses.clipped_policy(x, jnp.float32(3.0), 0.2)
    )(0.0)
    np.testing.assert_allclose(gradient, -3.0, rtol=1e-6)

  def test_gradient_is_zero_where_clipped(self):
    for ratio, advantage in ((1.5, 1.0), (0.5, -1.0)):
      gradient = jax.grad(losses.clipped_policy)(
        jnp.log(ratio), jnp.float32(advantage), 0.2
      )
      assert float(gradient) == 0


class TestK3:
  def test_equals_closed_form(self):
    found = losses.k3(
      jnp.array([-1.0, -1.0, -2.0]), jnp.array([-1.0, -2.0, -1.0])
    )
    np.testing.assert_allclose(found, [0, np.exp(-1), np.e - 2], atol=1e-6)

  def test_is_not_dropped_above_10(self):
    np.testing.assert_allclose(
      losses.k3(jnp.float32(-4), jnp.float32(0)), np.exp(4) - 5, rtol=1e-6
    )


class TestTokenMask:
  def test_leaves_begin_and_end_out(self):
    found = losses.token_mask(jnp.array([2, 3, 5]), 5)
    np.testing.assert_array_equal(
      found, [[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]]
    )

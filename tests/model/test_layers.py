"""Tests of the shared layers: fixed tables, norms, projections, rotary positions, patches."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r3jax.model import layers


class TestSincosTable:
  def test_puts_the_column_first(self):
    # row 1, column 2; one frequency, 1
    row = layers.sincos_table(4, 3)[1 * 3 + 2]
    np.testing.assert_allclose(
      row, [np.sin(2), np.cos(2), np.sin(1), np.cos(1)], rtol=1e-12
    )

  def test_refuses_a_width_that_is_no_multiple_of_4(self):
    with pytest.raises(ValueError, match="multiple of 4; got 6"):
      layers.sincos_table(6, 2)


class TestTimestepFeatures:
  def test_is_ones_then_zeros_at_zero(self):
    features = layers.timestep_features(jnp.zeros(1), width=6)
    np.testing.assert_array_equal(features, [[1, 1, 1, 0, 0, 0]])

  def test_is_float32_for_a_bfloat16_time(self):
    assert (
      layers.timestep_features(jnp.ones(2, jnp.bfloat16)).dtype == jnp.float32
    )


class TestRMSNorm:
  def test_divides_by_the_root_mean_square(self):
    x = jnp.array([[3.0, 4.0]])
    y = layers.RMSNorm(0.0).apply(
      {"params": {"scale": jnp.array([1.0, 2.0])}}, x
    )
    np.testing.assert_allclose(y, [[3 / 12.5**0.5, 8 / 12.5**0.5]], rtol=1e-6)

  def test_computes_in_float32_for_bfloat16_input(self):
    x = jax.random.normal(jax.random.key(0), (4, 512)).astype(jnp.bfloat16)
    norm = layers.RMSNorm(1e-6, jnp.bfloat16)
    y = norm.apply({"params": {"scale": jnp.ones(512)}}, x)
    wide = np.asarray(x, np.float64)
    wide /= np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float64), wide, rtol=2**-8)

  def test_names_its_axis(self):
    boxed = layers.RMSNorm(1e-6, axis="head_dim").init(
      jax.random.key(0), jnp.ones((1, 4))
    )
    assert boxed["params"]["scale"].names == ("head_dim",)


def _scalar_of_product(x, kernel, num_contracted):
  y = layers.product(x, kernel, num_contracted, jnp.float32)
  return jnp.sin(y).sum()


class TestProduct:
  @pytest.mark.parametrize("inputs, features", [((8,), (6,)), ((4, 2), (3, 5))])
  def test_gradients_are_those_of_tensordot(self, inputs, features):
    x = jax.random.normal(jax.random.key(0), (2, 7, *inputs))
    kernel = jax.random.normal(jax.random.key(1), (*inputs, *features))
    count = len(inputs)

    def expected_scalar(x, kernel):
      return jnp.sin(jnp.tensordot(x, kernel, count)).sum()

    found = jax.grad(_scalar_of_product, (0, 1))(x, kernel, count)
    expected = jax.grad(expected_scalar, (0, 1))(x, kernel)
    for gradient, expected_gradient in zip(found, expected, strict=True):
      np.testing.assert_allclose(gradient, expected_gradient, atol=1e-5)

  def test_kernel_gradient_has_the_inputs_on_its_left(self):
    """JAX's own has them on its right, and transposes what it multiplies: [6, 8]."""
    gradient = jax.grad(_scalar_of_product, 1)
    x = jnp.ones((7, 8))
    program = jax.make_jaxpr(gradient, static_argnums=2)(x, jnp.ones((8, 6)), 1)
    products = [
      equation.outvars[0].aval.shape
      for equation in program.jaxpr.eqns
      if equation.primitive.name == "dot_general"
    ]
    assert products[-1] == (8, 6)

  def test_sums_over_devices_are_in_the_dtype_of_the_inputs(self):
    """Devices with parts of the features send each other these sums, by `to_x` of the vjp."""
    gradient = jax.grad(_scalar_of_product, 0)
    x = jnp.ones((7, 8), jnp.bfloat16)
    kernel = jnp.ones((8, 6), jnp.bfloat16)
    program = jax.make_jaxpr(gradient, static_argnums=2)(x, kernel, 1)
    dtypes = [
      equation.outvars[0].aval.dtype
      for equation in program.jaxpr.eqns
      if equation.primitive.name == "dot_general"
    ]
    assert dtypes[-1] == jnp.bfloat16


class TestProjection:
  def test_contracts_several_axes(self):
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    module = layers.Projection((6,), ("heads", "head_dim", "embed"), 2, True)
    params = nn.meta.unbox(module.init(jax.random.key(1), x))
    with jax.default_matmul_precision("highest"):
      y = module.apply(params, x)
    kernel = params["params"]["kernel"]
    assert kernel.shape == (4, 5, 6)
    np.testing.assert_allclose(
      y, np.einsum("abhd,hde->abe", x, kernel), atol=1e-5
    )

  def test_keeps_the_variance_of_its_input(self):
    x = jax.random.normal(jax.random.key(0), (64, 8, 32))
    module = layers.Projection((16, 16), ("a", "b", "c", "d"), 2)
    y, _ = module.init_with_output(jax.random.key(1), x)
    assert 0.9 < float(jnp.var(y)) < 1.1

  def test_computes_in_its_dtype_and_keeps_float32_parameters(self):
    module = layers.Projection(
      (3,), ("a", "b"), use_bias=True, dtype=jnp.bfloat16
    )
    y, params = module.init_with_output(jax.random.key(0), jnp.ones((2, 4)))
    assert y.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}

  def test_wide_result_is_not_rounded(self):
    """The relative error of a bfloat16 product is 1.7e-3 where it is rounded, now 1e-7."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(8, 64)), jnp.bfloat16)
    module = layers.Projection(
      (32,), ("a", "b"), use_bias=True, dtype=jnp.bfloat16, is_wide=True
    )
    y, params = module.init_with_output(jax.random.key(0), x)
    kernel = nn.meta.unbox(params)["params"]["kernel"].astype(jnp.bfloat16)
    expected = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    assert y.dtype == jnp.float32
    error = np.linalg.norm(y - expected) / np.linalg.norm(expected)
    assert error < 1e-6

  def test_gradient_of_the_bias_is_a_float32_sum(self):
    """Over 8,192 rows: relative error 0.0065 as a sum in bfloat16, now that of one rounding."""
    rng = np.random.default_rng(0)
    weights = jnp.asarray(rng.normal(0.5, size=(8, 1024, 16)), jnp.bfloat16)
    x = jnp.ones((8, 1024, 4))
    module = layers.Projection(
      (16,), ("a", "b"), use_bias=True, dtype=jnp.bfloat16
    )
    params = nn.meta.unbox(module.init(jax.random.key(0), x))

    @jax.jit
    def weighted_sum(params, x, weights):
      y = module.apply(params, x).astype(jnp.float32)
      return jnp.sum(y * weights.astype(jnp.float32))

    gradient = jax.grad(weighted_sum)(params, x, weights)["params"]["bias"]
    expected = np.asarray(weights, np.float64).sum(axis=(0, 1))
    error = np.linalg.norm(gradient - expected) / np.linalg.norm(expected)
    assert error < 0.0025


class TestRope:
  def test_rotates_halves_by_the_position(self):
    x = jnp.array([1.0, 0.0, 0.0, 1.0]).reshape(1, 1, 1, 4)
    y = layers.rope(x, jnp.array([[2]]), theta=100.0)[0, 0, 0]
    slow = 2 / 100.0**0.5
    np.testing.assert_allclose(
      y, [np.cos(2), -np.sin(slow), np.sin(2), np.cos(slow)], atol=1e-6
    )

  def test_dot_product_depends_on_the_difference_of_positions(self):
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))

    def at(x, p):
      return layers.rope(x, jnp.array([[p]]), 1e4)

    near = jnp.sum(at(query, 5) * at(key, 3))
    far = jnp.sum(at(query, 105) * at(key, 103))
    np.testing.assert_allclose(near, far, atol=1e-4)

  def test_computes_angles_in_float32_for_bfloat16_input(self):
    x = jnp.ones((1, 1, 1, 8))
    positions = jnp.array([[1001]])  # not a bfloat16 number
    narrow = layers.rope(x.astype(jnp.bfloat16), positions, 1e6)
    assert narrow.dtype == jnp.float32  # the caller rounds it, once
    wide = layers.rope(x, positions, 1e6)
    np.testing.assert_array_equal(narrow, wide)


class TestFullAttention:
  def test_averages_values_where_scores_are_equal(self):
    value = jnp.arange(6.0).reshape(1, 3, 1, 2)
    y = layers.full_attention(
      jnp.zeros((1, 3, 1, 4)), jnp.ones((1, 3, 1, 4)), value
    )
    np.testing.assert_allclose(
      y, np.broadcast_to([2.0, 3.0], (1, 3, 1, 2)), rtol=1e-6
    )

  def test_scales_scores_by_the_root_of_the_head_width(self):
    query = jnp.full((1, 1, 1, 4), 1.0)
    key = jnp.stack([jnp.zeros((1, 1, 4)), jnp.ones((1, 1, 4))], axis=1)
    value = jnp.array([0.0, 1.0]).reshape(1, 2, 1, 1)
    weight = float(layers.full_attention(query, key, value)[0, 0, 0, 0])
    assert weight == pytest.approx(np.exp(2) / (1 + np.exp(2)), rel=1e-5)

  @pytest.mark.parametrize("width", [72, 512])  # of ViT and autoencoder
  def test_rounds_operands_alone_in_bfloat16(self, width):
    """Scores that are rounded before the softmax give 0.0102 and 0.0100; now 0.0023."""
    rng = np.random.default_rng(0)
    query, key, value = rng.normal(size=(3, 1, 64, 4, width))
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in (2 * query, 2 * key, value)]
    query, key, value = (np.asarray(x, np.float64) for x in narrow)
    scores = np.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(width)
    weights = np.exp(scores)
    weights /= weights.sum(axis=-1, keepdims=True)
    expected = np.einsum("bhqk,bkhd->bqhd", weights, value)
    result = layers.full_attention(*narrow)
    assert result.dtype == jnp.bfloat16
    error = np.linalg.norm(np.asarray(result, np.float64) - expected)
    assert error / np.linalg.norm(expected) < 0.0026


class TestGridPositions:
  def test_counts_rows_by_the_side_of_the_table(self):
    np.testing.assert_array_equal(
      layers.grid_positions(2, 3, 7), [0, 1, 2, 7, 8, 9]
    )

  def test_refuses_a_grid_beyond_the_table(self):
    with pytest.raises(ValueError, match="fit the 4x4 position table; got 2x5"):
      layers.grid_positions(2, 5, 4)


class TestPatchify:
  def test_orders_row_column_channel(self):
    x = jnp.arange(2 * 4 * 2).reshape(1, 2, 4, 2)
    tokens = layers.patchify(x, 2)
    np.testing.assert_array_equal(tokens[0, 1], [4, 5, 6, 7, 12, 13, 14, 15])

  def test_refuses_a_side_that_is_no_multiple_of_the_patch(self):
    with pytest.raises(ValueError, match="got 3x4"):
      layers.patchify(jnp.zeros((1, 3, 4, 2)), 2)


class TestUnpatchify:
  def test_undoes_patchify_on_a_wide_grid(self):
    x = jax.random.normal(jax.random.key(0), (2, 4, 6, 3))
    np.testing.assert_array_equal(
      layers.unpatchify(layers.patchify(x, 2), (2, 3), 2), x
    )

  def test_refuses_a_grid_of_another_size(self):
    with pytest.raises(ValueError, match="must have 4 tokens; got 6"):
      layers.unpatchify(jnp.zeros((1, 6, 12)), (2, 2), 2)

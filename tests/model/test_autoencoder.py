"""Tests of the FLUX autoencoder beside its golden case (tests/parity)."""

import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r3jax.checkpoint import bagel_config
from r3jax.checkpoint import bagel_files
from r3jax.model import architecture
from r3jax.model import autoencoder

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "tiny-a"


@pytest.fixture(scope="module")
def golden():
  return np.load(GOLDENS / "a_vae.npz")


@pytest.fixture(scope="module")
def config():
  return bagel_config.load(GOLDENS)


@pytest.fixture(scope="module")
def weights(config):
  return bagel_files.load(GOLDENS, config)["autoencoder"]


def _channels_last(x):
  return np.moveaxis(x, 1, -1)


def _run(method, config, weights, x, dtype=jnp.float32):
  model = autoencoder.Autoencoder(
    config.autoencoder, dtype, config.latent_patch
  )
  run = jax.jit(
    lambda params, x: model.apply({"params": params}, x, method=method)
  )
  with jax.default_matmul_precision("highest"):
    return run(weights, x)


def _features(dtype=jnp.float32):
  x = np.random.default_rng(0).normal(1, 2, size=(2, 3, 5, 64))
  return jnp.asarray(x, dtype)


class TestGroupNorm:
  @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
  def test_equals_flax_group_norm(self, dtype):
    x = _features(dtype)
    module = autoencoder.GroupNorm(jnp.dtype(dtype))
    rng = np.random.default_rng(1)
    scale = jnp.asarray(rng.normal(size=64), jnp.float32)
    bias = jnp.asarray(rng.normal(size=64), jnp.float32)
    params = {"params": {"scale": scale, "bias": bias}}
    other = nn.GroupNorm(
      autoencoder.NUM_GROUPS,
      epsilon=autoencoder.NORM_EPS,
      dtype=jnp.dtype(dtype),
      use_fast_variance=False,
    )
    normed = module.apply(params, x)
    assert normed.dtype == x.dtype
    expected = np.asarray(other.apply(params, x), np.float32)
    tolerance = 2e-6 if dtype == "float32" else 2**-7
    np.testing.assert_allclose(
      np.asarray(normed, np.float32), expected, rtol=tolerance, atol=tolerance
    )

  def test_of_large_means_keeps_its_digits(self):
    module = autoencoder.GroupNorm(jnp.float32)
    x = _features()
    params = {"params": {"scale": jnp.ones(64), "bias": jnp.zeros(64)}}
    shifted = module.apply(params, x + 1000)
    np.testing.assert_allclose(shifted, module.apply(params, x), atol=1e-3)


class TestUpsample:
  def _run(self, dtype):
    x = _features(dtype)
    rng = np.random.default_rng(1)
    kernel = jnp.asarray(rng.normal(size=(3, 3, 64, 7)), jnp.float32)
    bias = jnp.asarray(rng.normal(size=7), jnp.float32)
    params = {"conv": {"kernel": kernel, "bias": bias}}
    module = autoencoder.Upsample(7, jnp.dtype(dtype))
    doubled = module.apply({"params": params}, x)
    conv = nn.Conv(7, (3, 3), dtype=jnp.dtype(dtype))
    repeated = x.repeat(2, axis=1).repeat(2, axis=2)
    return doubled, conv.apply({"params": params["conv"]}, repeated)

  def test_equals_the_convolution_of_the_doubled_features(self):
    with jax.default_matmul_precision("highest"):
      doubled, expected = self._run("float32")
    assert doubled.shape == (2, 6, 10, 7)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(doubled, expected, atol=1e-6 * scale)

  def test_rounds_no_sums_of_weights_in_bfloat16(self):
    doubled, expected = self._run("bfloat16")
    assert doubled.dtype == jnp.bfloat16
    np.testing.assert_array_equal(doubled, expected)


class TestEncode:
  def test_agrees_with_itself_in_float64(self, golden, config, weights):
    pixels = _channels_last(golden["image"])[:, :32, :48]
    narrow = _run("encode", config, weights, pixels)
    with jax.enable_x64(True):
      wide = _run("encode", config, weights, pixels, jnp.float64)
      assert wide.dtype == jnp.float64
    np.testing.assert_allclose(narrow, wide, atol=1e-5, rtol=0)

  def test_refuses_pixels_that_are_no_whole_tokens(self, config, weights):
    with pytest.raises(
      ValueError, match=r"multiples of the patch \(2\); got 3x2"
    ):
      _run("encode", config, weights, jnp.zeros((1, 24, 16, 3)))


class TestAutoencoder:
  def test_gives_float32_near_the_golden_in_bfloat16(
    self, golden, config, weights
  ):
    x = _channels_last(golden["image"])
    latent = _run("encode", config, weights, x, jnp.bfloat16)
    assert latent.dtype == jnp.float32
    error = np.abs(np.asarray(latent) - golden["latent_tokens"])
    assert error.mean() < 0.02 * np.abs(golden["latent_tokens"]).mean()

  def test_reconstructs_the_shape_of_a_wide_image_with_fewer_levels(self):
    sizes = architecture.AutoencoderConfig(
      channels=32, multipliers=(1, 2), num_res_blocks=1
    )
    model = autoencoder.Autoencoder(sizes)
    pixels = jnp.zeros((2, 8, 12, 3))
    out, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), pixels)
    assert out.shape == pixels.shape

  def test_names_every_axis(self, config, weights):
    model = autoencoder.Autoencoder(config.autoencoder)
    pixels = jnp.zeros((1, 16, 16, 3))
    boxed = jax.eval_shape(model.init, jax.random.key(0), pixels)["params"]
    boxes = jax.tree.leaves(
      boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
    )
    assert all(len(box.names) == len(box.value.shape) for box in boxes)

    def shapes(tree):
      return jax.tree.map(lambda x: x.shape, tree)

    assert shapes(nn.meta.unbox(boxed)) == shapes(weights)

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

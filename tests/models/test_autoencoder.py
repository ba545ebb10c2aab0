"""Tests of the FLUX autoencoder against the golden images and latents (case a)."""

import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r3jax.io import bagel_checkpoint
from r3jax.io import images
from r3jax.models import autoencoder
from r3jax.models import config as config_lib
from r3jax.models import layers

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "tiny-a"


@pytest.fixture(scope="module")
def golden():
  return np.load(GOLDENS / "a_vae.npz")


@pytest.fixture(scope="module")
def config():
  return config_lib.from_folder(GOLDENS)


@pytest.fixture(scope="module")
def weights(config):
  return bagel_checkpoint.load(GOLDENS, config)["autoencoder"]


@pytest.fixture(scope="module")
def decoded(golden, config, weights):
  cells = np.array(golden["decode_latent"].shape[2:]) // config.latent_patch
  model = autoencoder.Autoencoder(config.autoencoder, latent_patch=config.latent_patch)
  decode = lambda params, x: model.apply({"params": params}, x, tuple(cells), method="decode")
  with jax.default_matmul_precision("highest"):
    return jax.jit(decode)(weights, golden["decode_latent_tokens"])


def _channels_last(x):
  return np.moveaxis(x, 1, -1)


def _run(method, config, weights, x, dtype=jnp.float32):
  model = autoencoder.Autoencoder(config.autoencoder, dtype, config.latent_patch)
  run = jax.jit(lambda params, x: model.apply({"params": params}, x, method=method))
  with jax.default_matmul_precision("highest"):
    return run(weights, x)


class TestMoments:

  def test_equals_golden(self, golden, config, weights):
    moments = _run("moments", config, weights, _channels_last(golden["image"]))
    expected = _channels_last(golden["moments"])
    np.testing.assert_allclose(moments, expected, atol=1e-4, rtol=0)


class TestEncode:

  def test_equals_golden(self, golden, config, weights):
    latent = _run("encode", config, weights, _channels_last(golden["image"]))
    np.testing.assert_allclose(latent, golden["latent_tokens"], atol=1e-4, rtol=0)
    grid = np.array(golden["latent"].shape[2:]) // config.latent_patch
    cells = layers.unpatchify(latent, tuple(grid), config.latent_patch)
    np.testing.assert_allclose(cells, _channels_last(golden["latent"]), atol=1e-4, rtol=0)

  def test_agrees_with_itself_in_float64(self, golden, config, weights):
    pixels = _channels_last(golden["image"])[:, :32, :48]
    narrow = _run("encode", config, weights, pixels)
    with jax.enable_x64(True):
      wide = _run("encode", config, weights, pixels, jnp.float64)
      assert wide.dtype == jnp.float64
    np.testing.assert_allclose(narrow, wide, atol=1e-5, rtol=0)

  def test_refuses_pixels_that_are_no_whole_tokens(self, config, weights):
    with pytest.raises(ValueError, match=r"multiples of the patch \(2\); got 3x2"):
      _run("encode", config, weights, jnp.zeros((1, 24, 16, 3)))


class TestDecode:

  def test_equals_golden(self, golden, decoded):
    expected = _channels_last(golden["decode_image"])
    np.testing.assert_allclose(decoded, expected, atol=2e-4, rtol=0)

  def test_gives_the_golden_8_bit_image(self, golden, decoded):
    levels = np.abs(np.asarray(images.to_uint8(decoded), int) - golden["decode_uint8"])
    assert levels.max() <= 1
    assert (levels > 0).mean() < 1e-3


class TestAutoencoder:

  def test_tokens_of_the_golden_latent_are_ordered_row_column_channel(self, golden, config):
    tokens = layers.patchify(_channels_last(golden["decode_latent"]), config.latent_patch)
    np.testing.assert_array_equal(tokens, golden["decode_latent_tokens"])

  def test_gives_float32_near_the_golden_in_bfloat16(self, golden, config, weights):
    x = _channels_last(golden["image"])
    latent = _run("encode", config, weights, x, jnp.bfloat16)
    assert latent.dtype == jnp.float32
    error = np.abs(np.asarray(latent) - golden["latent_tokens"])
    assert error.mean() < 0.02 * np.abs(golden["latent_tokens"]).mean()

  def test_reconstructs_the_shape_of_a_wide_image_with_fewer_levels(self):
    sizes = config_lib.AutoencoderConfig(channels=32, multipliers=(1, 2), num_res_blocks=1)
    model = autoencoder.Autoencoder(sizes)
    pixels = jnp.zeros((2, 8, 12, 3))
    out, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), pixels)
    assert out.shape == pixels.shape

  def test_names_every_axis(self, config, weights):
    model = autoencoder.Autoencoder(config.autoencoder)
    pixels = jnp.zeros((1, 16, 16, 3))
    boxed = jax.eval_shape(model.init, jax.random.key(0), pixels)["params"]
    boxes = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    assert all(len(box.names) == len(box.value.shape) for box in boxes)
    shapes = lambda tree: jax.tree.map(lambda x: x.shape, tree)
    assert shapes(nn.meta.unbox(boxed)) == shapes(weights)

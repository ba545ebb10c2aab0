"""Tests of the vision tower beside its golden case (tests/parity)."""

import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r3jax.checkpoint import bagel_config
from r3jax.checkpoint import bagel_files
from r3jax.model import layers
from r3jax.model import siglip

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "tiny-a"


@pytest.fixture(scope="module")
def golden():
  return np.load(GOLDENS / "b_vit.npz")


@pytest.fixture(scope="module")
def config():
  return bagel_config.load(GOLDENS)


@pytest.fixture(scope="module")
def weights(config):
  return bagel_files.load(GOLDENS, config)


def _patches(image, config):
  """Returns the patches and position ids of a golden CHW image."""
  patch, side = config.vision.patch_size, config.vision.positions_per_side
  pixels = np.moveaxis(image, 0, -1)[None]
  grid = (pixels.shape[1] // patch, pixels.shape[2] // patch)
  return layers.patchify(pixels, patch), layers.grid_positions(*grid, side)


def _features(image, config, weights, dtype=jnp.float32):
  tower = siglip.VisionTransformer(config.vision, dtype)
  with jax.default_matmul_precision("highest"):
    return jax.jit(tower.apply)(
      {"params": weights["vision"]}, *_patches(image, config)
    )[0]


class TestVisionTransformer:
  def test_agrees_with_itself_in_float64(self, golden, config, weights):
    narrow = _features(golden["image2"], config, weights)
    with jax.enable_x64(True):
      wide = _features(golden["image2"], config, weights, jnp.float64)
      assert wide.dtype == jnp.float64
    np.testing.assert_allclose(narrow, wide, atol=1e-5, rtol=0)

  def test_images_of_a_batch_do_not_see_each_other(
    self, golden, config, weights
  ):
    patches, ids = _patches(golden["image1"], config)
    tower = siglip.VisionTransformer(config.vision)
    both = tower.apply(
      {"params": weights["vision"]}, jnp.concatenate([patches, -patches]), ids
    )
    alone = tower.apply({"params": weights["vision"]}, patches, ids)
    np.testing.assert_allclose(both[:1], alone, atol=1e-5, rtol=0)

  def test_names_every_axis_and_stacks_layers(self, config, weights):
    tower = siglip.VisionTransformer(config.vision)
    patches = jnp.zeros((1, 1, 3 * config.vision.patch_size**2))
    boxed = jax.eval_shape(
      tower.init, jax.random.key(0), patches, jnp.zeros(1, int)
    )["params"]
    boxes = jax.tree.leaves(
      boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
    )
    assert all(len(box.names) == len(box.value.shape) for box in boxes)
    assert boxed["layers"]["q"]["kernel"].names[0] == "layers"

    def shapes(tree):
      return jax.tree.map(lambda x: x.shape, tree)

    assert shapes(nn.meta.unbox(boxed)) == shapes(weights["vision"])

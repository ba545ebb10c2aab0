"""Tests of 8-bit conversion and of the resize rule and filter."""

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from r3jax.model import architecture
from r3jax.model import preprocess

# (height, width) before and after: up, down, mixed, large factors, a single pixel
SIZES = [
  ((37, 53), (56, 84)),
  ((128, 96), (126, 84)),
  ((20, 33), (70, 14)),
  ((200, 150), (12, 7)),
  ((5, 7), (64, 3)),
  ((1, 1), (4, 4)),
  # 30 rows and 15 columns, then 31 and 15 go: in Pillow 13 the latter go down first
  ((60, 40), (30, 25)),
  ((60, 40), (29, 25)),
  ((60, 20), (40, 30)),
]


def _pil(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Resizes across, then down; in two calls, as newer PILs choose the order themselves."""
  height, width = size
  across = Image.fromarray(image).resize((width, image.shape[0]), Image.BICUBIC)
  return np.asarray(across.resize((width, height), Image.BICUBIC))


class TestToPixels:
  def test_maps_bytes_to_minus_one_to_one(self):
    pixels = preprocess.to_pixels(jnp.array([0, 51, 255], jnp.uint8))
    np.testing.assert_allclose(pixels, [-1.0, -0.6, 1.0], atol=1e-6)


class TestToUint8:
  def test_truncates_and_clips(self):
    pixels = jnp.array([-3.0, -1.0, 2 * 10.9 / 255 - 1, 0.0, 1.0, 1.5])
    np.testing.assert_array_equal(
      preprocess.to_uint8(pixels), [0, 0, 10, 127, 255, 255]
    )

  def test_loses_at_most_one_level_in_a_round_trip(self):
    levels = np.arange(256, dtype=np.uint8)
    back = np.asarray(
      preprocess.to_uint8(preprocess.to_pixels(jnp.asarray(levels)))
    )
    assert np.abs(back.astype(int) - levels).max() <= 1

  def test_computes_in_float32_for_bfloat16_pixels(self):
    pixels = jnp.array([0.99609375], jnp.bfloat16)  # (1 + x) / 2 needs 9 bits
    np.testing.assert_array_equal(preprocess.to_uint8(pixels), [254])


class TestTargetSize:
  def test_keeps_the_training_canvas(self):
    assert preprocess.target_size(
      512, 512, architecture.ImageTransform(512, 256, 16)
    ) == (512, 512)
    assert preprocess.target_size(
      512, 512, architecture.ImageTransform(504, 252, 14)
    ) == (504, 504)


class TestResize:
  @pytest.mark.parametrize("before, after", SIZES)
  def test_equals_pil_on_noise_and_on_black_and_white(self, before, after):
    noise = np.random.default_rng(0).integers(0, 256, (*before, 3), np.uint8)
    batch = np.stack([noise, (noise > 127).astype(np.uint8) * 255])
    resized = jax.jit(preprocess.resize, static_argnums=1)(batch, after)
    assert resized.dtype == jnp.uint8
    np.testing.assert_array_equal(
      resized, np.stack([_pil(image, after) for image in batch])
    )

  @pytest.mark.parametrize("before, after", SIZES)
  def test_equals_pillow_13_where_the_cheaper_pass_comes_first(
    self, before, after
  ):
    image = np.random.default_rng(0).integers(0, 256, (*before, 3), np.uint8)
    height, width = after
    expected = Image.fromarray(image).resize((width, height), Image.BICUBIC)
    resize = jax.jit(preprocess.resize, static_argnums=(1, 2))
    resized = resize(image[None], after, "cheaper_first")
    np.testing.assert_array_equal(resized[0], expected)

  def test_the_orders_differ_where_many_more_rows_than_columns_go(self):
    image = np.random.default_rng(0).integers(0, 256, (1, 60, 40, 3), np.uint8)
    resize = jax.jit(preprocess.resize, static_argnums=(1, 2))
    differs = {}
    for first, size in {"across": (30, 25), "down": (29, 25)}.items():
      across = resize(image, size)
      cheaper = resize(image, size, "cheaper_first")
      differs[first] = bool((across != cheaper).any())
    assert differs == {"across": False, "down": True}

  def test_returns_the_image_where_the_size_is_unchanged(self):
    image = np.random.default_rng(0).integers(0, 256, (1, 9, 5, 3), np.uint8)
    np.testing.assert_array_equal(
      preprocess.resize(jnp.asarray(image), (9, 5)), image
    )

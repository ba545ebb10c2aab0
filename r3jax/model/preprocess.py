"""8-bit images <-> model pixels, and the resize rule with PIL's bicubic filter inside the graph."""

import functools
import io
import math

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from r3jax import types
from r3jax.model import architecture

MAX_AREA = 14 * 14 * 9 * 1024  # pixels; larger images are shrunk
CUBIC = -0.5  # the free parameter of the bicubic kernel
SUPPORT = 2.0  # radius of the kernel in (output) pixels
COEFFICIENT_BITS = 22  # PIL's fixed point for 8-bit images
# coefficients are split here, so that float32 sums of products are exact
HIGH_BITS = 11


def to_pixels(images: types.Images) -> types.Pixels:
  """Returns `(x/255 - 0.5) / 0.5`: uint8 -> float32 in [-1, 1]."""
  return (images.astype(jnp.float32) / 255.0 - 0.5) / 0.5


def to_uint8(pixels: types.Pixels) -> types.Images:
  """Returns `floor(clip(y/2 + 1/2, 0, 1) * 255)` as uint8 (R3.md section 4)."""
  pixels = pixels.astype(jnp.promote_types(pixels.dtype, jnp.float32))
  return jnp.floor(jnp.clip(pixels * 0.5 + 0.5, 0.0, 1.0) * 255.0).astype(
    jnp.uint8
  )


def png(image: np.ndarray) -> bytes:
  """Returns a uint8 [H, W, 3] image as a PNG file.

  Raises:
    ValueError: if it is something else.
  """
  image = np.asarray(image)
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
    raise ValueError(
      f"an image must be uint8 [H, W, 3], got {image.dtype} {list(image.shape)}"
    )
  buffer = io.BytesIO()
  PIL.Image.fromarray(image).save(buffer, format="PNG", optimize=True)
  return buffer.getvalue()


def target_size(
  height: int, width: int, transform: architecture.ImageTransform
) -> tuple[int, int]:
  """Returns the (height, width) that an image is resized to (R3.md section 4, goldens section 13).

  The longest side is at most `max_size`, then the shortest at least `min_size` (which may push the
  longest over again), both multiples of the stride; too large an area is shrunk, then too long a
  side.

  Args:
    height: of the image, in pixels.
    width: of the image, in pixels.
    transform: the limits.
  """

  def scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
    strides = (round(round(side * scale) / transform.stride) for side in size)
    return tuple(max(count, 1) * transform.stride for count in strides)

  scale = min(transform.max_size / max(height, width), 1.0)
  scale = max(scale, transform.min_size / min(height, width))
  size = scaled((height, width), scale)
  if math.prod(size) > MAX_AREA:
    size = scaled(size, MAX_AREA / math.prod(size))
  if max(size) > transform.max_size:
    size = scaled(size, transform.max_size / max(size))
  return size


def _bicubic(x: np.ndarray) -> np.ndarray:
  """Evaluates the cubic convolution kernel."""
  x = np.abs(x)
  near = ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1
  far = (((x - 5) * x + 8) * x - 4) * CUBIC
  return np.where(x < 1, near, np.where(x < SUPPORT, far, 0.0))


@functools.lru_cache(maxsize=64)
def _coefficients(before: int, after: int) -> np.ndarray:
  """Returns the int32 fixed-point [after, before] matrix that resizes one axis as PIL does."""
  scale = before / after
  # antialiasing: the kernel covers the input pixels of an output pixel
  widening = max(scale, 1.0)
  center = (np.arange(after)[:, None] + 0.5) * scale
  first = np.maximum(np.trunc(center - SUPPORT * widening + 0.5), 0)
  last = np.minimum(np.trunc(center + SUPPORT * widening + 0.5), before)
  source = np.arange(before)[None, :]
  weights = _bicubic((source - center + 0.5) / widening) * (
    (first <= source) & (source < last)
  )
  weights = weights / weights.sum(axis=1, keepdims=True)
  fixed = weights * 2**COEFFICIENT_BITS
  return np.trunc(fixed + np.copysign(0.5, fixed)).astype(np.int32)


def _resize_axis(images: types.Images, axis: int, size: int) -> types.Images:
  """Resizes one axis to 8 bits: a fixed-point product, rounded half up and clipped."""
  if images.shape[axis] == size:
    return images
  fixed = _coefficients(images.shape[axis], size)
  high = (fixed + 2 ** (HIGH_BITS - 1)) >> HIGH_BITS
  parts = np.stack([high, fixed - (high << HIGH_BITS)]).astype(np.float32)
  x = jnp.moveaxis(images, axis, -1).astype(jnp.float32)
  sums = jnp.einsum(
    "poi,...i->p...o", parts, x, precision=jax.lax.Precision.HIGHEST
  )
  high_sum, low_sum = sums.astype(jnp.int32)
  total = (high_sum << HIGH_BITS) + low_sum + 2 ** (COEFFICIENT_BITS - 1)
  return jnp.moveaxis(
    jnp.clip(total >> COEFFICIENT_BITS, 0, 255).astype(jnp.uint8), -1, axis
  )


def resize(images: types.Images, size: tuple[int, int]) -> types.Images:
  """Resizes like PIL: antialiased bicubic, across then down, 8 bits after each pass.

  Equal to Pillow before 13; from 13 on Pillow takes the cheaper pass first, which is the downward
  one where the height shrinks more than the width (resize in two calls to compare with it).

  Args:
    images: [B, H, W, 3] uint8.
    size: static (height, width).

  Returns:
    [B, height, width, 3] uint8; the input where the size is unchanged.
  """
  height, width = size
  return _resize_axis(_resize_axis(images, 2, width), 1, height)

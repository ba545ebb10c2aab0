"""8-bit images <-> model pixels, and the resize rule with PIL's bicubic filter inside the graph."""

import functools
import io
import math
from typing import Literal

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
# Coefficients are split at this bit, so that float32 sums of products are exact.
HIGH_BITS = 11

# Which pass of a resize comes first; 8 bits after each pass make the results differ.
# "width_first" is that of Pillow before 13, with which BAGEL was trained.
# "cheaper_first" is that of Pillow from 13 on.
ResizeOrder = Literal["width_first", "cheaper_first"]


def to_pixels(images: types.Images) -> types.Pixels:
  """Returns (x / 255 - 0.5) / 0.5: uint8 -> float32 in [-1, 1]."""
  unit = images.astype(jnp.float32) / 255.0
  return (unit - 0.5) / 0.5


def to_uint8(pixels: types.Pixels) -> types.Images:
  """Returns floor(clip(y / 2 + 1/2, 0, 1) * 255) as uint8 (docs/algorithm.md#sampling-images).

  NaN becomes 0: what a conversion of NaN to integers gives depends on the machine.
  """
  pixels = pixels.astype(jnp.promote_types(pixels.dtype, jnp.float32))
  unit = jnp.clip(pixels * 0.5 + 0.5, 0.0, 1.0)
  unit = jnp.where(jnp.isnan(unit), 0.0, unit)
  return jnp.floor(unit * 255.0).astype(jnp.uint8)


def png(image: np.ndarray) -> bytes:
  """Returns a uint8 [h, w, 3] image as a PNG file.

  Raises:
    ValueError: the array is something else.
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
  """Returns the (height, width) that an image is resized to (docs/algorithm.md#model).

  The longest side is at most `max_size`, then the shortest at least `min_size` (which may push the
  longest over again), both multiples of the stride; too large an area is shrunk, then too long a
  side.

  Args:
    height: of the image, in pixels.
    width: of the image, in pixels.
    transform: the limits.
  """

  def scaled_side(side: int, scale: float) -> int:
    # rounded twice, as in the reference
    num_strides = round(round(side * scale) / transform.stride)
    return max(num_strides, 1) * transform.stride

  def scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
    return scaled_side(size[0], scale), scaled_side(size[1], scale)

  scale = min(transform.max_size / max(height, width), 1.0)
  scale = max(scale, transform.min_size / min(height, width))
  size = scaled((height, width), scale)
  if math.prod(size) > MAX_AREA:
    size = scaled(size, MAX_AREA / math.prod(size))
  if max(size) > transform.max_size:
    size = scaled(size, transform.max_size / max(size))
  return size


def resize(
  images: types.Images,
  size: tuple[int, int],
  order: ResizeOrder = "width_first",
) -> types.Images:
  """Resizes like PIL: antialiased bicubic in two passes, 8 bits after each pass.

  Args:
    images: [B, h, w, 3] uint8.
    size: static (height, width).
    order: which pass comes first, see `ResizeOrder`.

  Returns:
    [B, height, width, 3] uint8; the input where the size is unchanged.
  """
  height, width = size
  _, height_before, width_before, _ = images.shape
  num_lost_rows = height_before - height
  num_lost_columns = width_before - width
  # Pillow 13's rule: rows are resized first where that removes many more lines than columns.
  is_cheaper = num_lost_rows > max(2 * num_lost_columns, 0)
  if order == "cheaper_first" and is_cheaper:
    down = _resize_axis(images, 1, height)
    return _resize_axis(down, 2, width)
  across = _resize_axis(images, 2, width)
  return _resize_axis(across, 1, height)


def _resize_axis(images: types.Images, axis: int, size: int) -> types.Images:
  """Resizes one axis to 8 bits: a fixed-point product, rounded half up and clipped."""
  if images.shape[axis] == size:
    return images
  # Two products of small integers instead of one: float32 holds their sums exactly.
  coefficients = _coefficients(images.shape[axis], size)
  high = (coefficients + 2 ** (HIGH_BITS - 1)) >> HIGH_BITS
  low = coefficients - (high << HIGH_BITS)
  parts = np.stack([high, low]).astype(np.float32)
  x = jnp.moveaxis(images, axis, -1).astype(jnp.float32)
  sums = jnp.einsum(
    "poi,...i->p...o", parts, x, precision=jax.lax.Precision.HIGHEST
  )
  high_sum, low_sum = sums.astype(jnp.int32)
  half = 2 ** (COEFFICIENT_BITS - 1)  # to round, the shift below truncates
  total = (high_sum << HIGH_BITS) + low_sum + half
  resized = jnp.clip(total >> COEFFICIENT_BITS, 0, 255).astype(jnp.uint8)
  return jnp.moveaxis(resized, -1, axis)


@functools.lru_cache(maxsize=64)
def _coefficients(before: int, after: int) -> np.ndarray:
  """Returns the int32 fixed-point [after, before] matrix that resizes one axis as PIL does."""
  scale = before / after
  # Antialiasing: the kernel covers the input pixels of an output pixel.
  widening = max(scale, 1.0)
  radius = SUPPORT * widening
  center = (np.arange(after)[:, None] + 0.5) * scale
  # PIL's bounds: input pixels whose centers lie within the radius.
  first = np.maximum(np.trunc(center - radius + 0.5), 0)
  last = np.minimum(np.trunc(center + radius + 0.5), before)
  source = np.arange(before)[None, :]
  is_inside = (first <= source) & (source < last)
  distance = (source - center + 0.5) / widening
  weights = _bicubic(distance) * is_inside
  weights = weights / weights.sum(axis=1, keepdims=True)
  # Rounded half away from zero, as PIL does.
  fixed = weights * 2**COEFFICIENT_BITS
  rounded = np.trunc(fixed + np.copysign(0.5, fixed))
  return rounded.astype(np.int32)


def _bicubic(x: np.ndarray) -> np.ndarray:
  """Evaluates the cubic convolution kernel."""
  x = np.abs(x)
  near = ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1
  far = (((x - 5) * x + 8) * x - 4) * CUBIC
  inside = np.where(x < 1, near, far)
  return np.where(x < SUPPORT, inside, 0.0)

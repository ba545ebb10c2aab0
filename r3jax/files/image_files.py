"""Reads image files as a viewer shows them."""

import io
import struct
import warnings

from etils import epath
import numpy as np
import PIL
import PIL.Image
import PIL.ImageOps

from r3jax.files import bounded
from r3jax.files import paths

MAX_PIXELS = 100_000_000  # some 400 MB while a file is decoded
_MAX_BYTES = 2**30
# Pillow knows 43 kinds; it would run Ghostscript for EPS.
FORMATS = (
  "PNG",
  "JPEG",
  "WEBP",
  "GIF",
  "BMP",
  "TIFF",
  "PPM",
  "TGA",
  "JPEG2000",
)
# What Pillow raises at files that are damaged, of no known kind, or suspiciously large.
UNREADABLE = (
  OSError,
  SyntaxError,
  ValueError,
  struct.error,
  PIL.Image.DecompressionBombError,
)
_BLACK_TO_WHITE_16 = 2**16 - 1
_MODES_16 = ("I;16", "I;16L", "I;16B", "I;16N")


def read(path: epath.PathLike) -> np.ndarray:
  """Returns an image file as uint8 [H, W, 3], see `as_shown`.

  Args:
    path: On a disk or in a bucket; "~" is the home folder.

  Raises:
    ValueError: It cannot be read, is no regular file, or has more than `MAX_PIXELS` pixels.
  """
  try:
    content = bounded.read_bytes(paths.of_user(path), _MAX_BYTES)
  except OSError as error:
    raise ValueError(f"{error}{paths.did_you_mean(path)}") from error
  try:
    return _decode(content)
  except PIL.UnidentifiedImageError as error:
    raise ValueError(
      f"{path} must be an image file, one of {', '.join(FORMATS)}"
    ) from error
  except UNREADABLE as error:
    raise ValueError(f"{error} ({path})") from error


def _decode(content: bytes) -> np.ndarray:
  """Returns the image of a file's bytes as uint8 [H, W, 3]."""
  with warnings.catch_warnings():
    # Our own limit is below the one that Pillow enforces, but above its warning.
    warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
    # The header says the size; nothing is decoded before it has been checked.
    with PIL.Image.open(io.BytesIO(content), formats=FORMATS) as image:
      if image.width * image.height > MAX_PIXELS:
        raise ValueError(
          f"an image must have at most {MAX_PIXELS} pixels; got {image.width} x {image.height}"
        )
      return as_shown(image)


def as_shown(image: PIL.Image.Image) -> np.ndarray:
  """Returns the pixels of an opened image as a viewer shows them, uint8 [H, W, 3].

  It is turned as its EXIF tag says, lies on white where it is transparent, and 16 bits are scaled
  to 8. Colour profiles are not applied.

  Raises:
    ValueError: Its pixels have no agreed black and white, as those of 32 bits.
  """
  image = PIL.ImageOps.exif_transpose(image)
  if image.mode in _MODES_16:
    image = _narrowed(image)
  if image.mode in ("I", "F"):
    raise ValueError(
      "an image must have 8 or 16 bits a channel; its pixels are of 32 "
      f"(Pillow's mode {image.mode!r}): convert it first"
    )
  if image.mode == "RGB" and "transparency" not in image.info:
    return np.asarray(image)
  image = image.convert("RGBA")
  white = PIL.Image.new("RGBA", image.size, "white")
  return np.asarray(PIL.Image.alpha_composite(white, image).convert("RGB"))


def _narrowed(image: PIL.Image.Image) -> PIL.Image.Image:
  """Returns a grey image of 16 bits with 8; Pillow's own conversion cuts off at 255."""
  grey = np.asarray(image).astype(np.float64) / _BLACK_TO_WHITE_16
  return PIL.Image.fromarray(np.round(255 * grey).astype(np.uint8))

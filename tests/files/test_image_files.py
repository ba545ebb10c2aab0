"""Tests of files/image_files.py: pixels are those that a viewer shows."""

import os
import pathlib

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest

from r3jax.files import image_files
from r3jax.generation import edit
from r3jax.rewards.remote import protocol

# A red corner on grey, so that every turn shows.
PICTURE = np.full((8, 12, 3), 128, np.uint8)
PICTURE[:4, :6] = (220, 30, 30)
ORIENTATION = 0x0112  # the EXIF tag


def _save(path, image: PIL.Image.Image, **options) -> bytes:
  image.save(path, **options)
  return path.read_bytes()


def _turned(turn: int) -> PIL.Image.Exif:
  tags = PIL.Image.Exif()
  tags[ORIENTATION] = turn
  return tags


# How each value of the tag moves the pixels of the file to those that are seen.
SEEN = {
  1: PICTURE,
  2: PICTURE[:, ::-1],
  3: PICTURE[::-1, ::-1],
  4: PICTURE[::-1],
  5: PICTURE.swapaxes(0, 1),
  6: np.rot90(PICTURE, -1),
  7: PICTURE[::-1, ::-1].swapaxes(0, 1),
  8: np.rot90(PICTURE, 1),
}


class TestAsShown:
  @pytest.mark.parametrize("turn", SEEN)
  def test_photo_is_turned_as_its_tag_says_wherever_it_is_read(
    self, tmp_path, turn
  ):
    path = tmp_path / "photo.png"
    content = _save(path, PIL.Image.fromarray(PICTURE), exif=_turned(turn))
    for pixels in (
      image_files.read(path),
      edit.read_image(str(path)),
      protocol.decode_image(content, "png", 1000),
    ):
      np.testing.assert_array_equal(pixels, SEEN[turn])

  def test_jpeg_is_turned_too(self, tmp_path):
    path = tmp_path / "photo.jpg"
    _save(path, PIL.Image.fromarray(PICTURE), exif=_turned(6), quality=98)
    pixels = image_files.read(path)
    assert pixels.shape == (12, 8, 3)
    difference = np.abs(np.int32(pixels) - SEEN[6])
    assert np.median(difference) < 3

  def test_grey_of_16_bits_is_scaled(self, tmp_path):
    grey = np.linspace(0, 65535, 32).astype(np.uint16).reshape(4, 8)
    path = tmp_path / "deep.png"
    _save(path, PIL.Image.fromarray(grey))
    pixels = image_files.read(path)
    assert pixels.dtype == np.uint8
    expected = np.round(grey / 257).astype(np.uint8)
    np.testing.assert_array_equal(pixels, expected[..., None].repeat(3, -1))

  @pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "RGBA", "LA"])
  def test_every_mode_of_8_bits_becomes_rgb(self, tmp_path, mode):
    path = tmp_path / "image.tiff"
    kept = {"LA": "image.png", "P": "image.png"}.get(mode, "image.tiff")
    path = tmp_path / kept
    image = PIL.Image.new("RGB", (5, 3), "white").convert(mode)
    _save(path, image)
    np.testing.assert_array_equal(
      image_files.read(path), np.full((3, 5, 3), 255, np.uint8)
    )

  def test_transparent_pixels_lie_on_white(self, tmp_path):
    clear = PIL.Image.new("RGBA", (5, 3), (255, 0, 0, 0))
    content = _save(tmp_path / "clear.png", clear)
    white = np.full((3, 5, 3), 255, np.uint8)
    for pixels in (
      image_files.read(tmp_path / "clear.png"),
      protocol.decode_image(content, "png", 100),
    ):
      np.testing.assert_array_equal(pixels, white)

  def test_colour_that_is_declared_transparent_lies_on_white(self, tmp_path):
    path = tmp_path / "key.png"
    black = PIL.Image.new("RGB", (5, 3), "black")
    _save(path, black, transparency=(0, 0, 0))
    assert image_files.read(path).min() == 255

  def test_nobody_else_opens_images(self):
    readers = {"files/image_files.py", "rewards/remote/protocol.py"}
    package = pathlib.Path(image_files.__file__).parents[1]
    openers = {
      str(path.relative_to(package))
      for path in package.rglob("*.py")
      if "Image.open(" in path.read_text()
    }
    assert openers == readers


class TestRefusals:
  def test_pixels_without_an_agreed_black_and_white_are_refused(self, tmp_path):
    path = tmp_path / "heights.tiff"
    _save(path, PIL.Image.fromarray(np.zeros((2, 2), np.float32)))
    with pytest.raises(ValueError, match="8 or 16 bits .* mode 'F'.*heights"):
      image_files.read(path)

  def test_image_that_is_too_large_is_refused_before_it_is_decoded(
    self, tmp_path, monkeypatch
  ):
    monkeypatch.setattr(image_files, "MAX_PIXELS", 95)
    _save(tmp_path / "large.png", PIL.Image.fromarray(PICTURE))
    with pytest.raises(
      ValueError, match=r"at most 95 pixels; got 12 x 8 \(.*large.png\)"
    ):
      image_files.read(tmp_path / "large.png")

  @pytest.mark.parametrize("length", [0, 20, 60])
  def test_damaged_file_is_refused_by_name(self, tmp_path, length):
    path = tmp_path / "cut.png"
    path.write_bytes(
      _save(tmp_path / "whole.png", PIL.Image.fromarray(PICTURE))[:length]
    )
    with pytest.raises(ValueError, match="cut.png"):
      image_files.read(path)

  def test_decompression_bomb_is_refused(self, tmp_path, monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 40)
    _save(tmp_path / "bomb.png", PIL.Image.fromarray(PICTURE))
    with pytest.raises(ValueError, match="decompression bomb.*bomb.png"):
      image_files.read(tmp_path / "bomb.png")


@pytest.mark.timeout(20)
def test_pipe_in_the_place_of_an_image_is_refused(tmp_path):
  os.mkfifo(tmp_path / "a.png")
  with pytest.raises(ValueError, match="a.png must be a regular file"):
    image_files.read(tmp_path / "a.png")


def test_kind_that_runs_a_program_is_refused(tmp_path):
  PIL.Image.fromarray(PICTURE).save(tmp_path / "a.eps")
  with pytest.raises(ValueError, match="a.eps must be an image file, one of"):
    image_files.read(tmp_path / "a.eps")

"""Tests of report/gallery.py."""

import numpy as np
import pytest

from r3jax.report import gallery


class TestDamage:
  @pytest.fixture
  def path(self, tmp_path):
    """File of a sample, which is written."""
    turn = gallery.GeneratedTurn(
      image="", score=0.5, text="t", instruction="", stop=False, seconds=1.0
    )
    sample = gallery.GeneratedSample(
      prompt="p",
      prompt_number=0,
      image_number=0,
      seed=0,
      model="m",
      size=(2, 2),
      turns=(turn,),
    )
    gallery.write(tmp_path, sample, [np.zeros((2, 2, 3), np.uint8)])
    return tmp_path / "00000_00.json"

  @pytest.mark.parametrize(
    "content", [b"", b'{"prompt": ', b"[]", b"{}", b"\xff", b"[" * 100_000]
  )
  def test_sample_counts_as_missing(self, path, caplog, content):
    assert gallery.read_one(path.parent, 0, 0) is not None
    path.write_bytes(content)
    assert gallery.read_one(path.parent, 0, 0) is None
    assert f"{path} must be a generated sample" in caplog.text
    gallery.write_page(path.parent, "without it")

  def test_folder_in_its_place_is_named(self, path):
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match=f"{path} must be a file"):
      gallery.read_one(path.parent, 0, 0)

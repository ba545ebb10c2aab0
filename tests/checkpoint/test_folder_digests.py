"""Tests of the digests that are written beside a model's files."""

import json
import shutil

from etils import epath
import pytest

from r3jax.checkpoint import folder_digests
from r3jax.checkpoint import pretrained
from r3jax.worlds import registry


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """A folder with small blocks, and its digests."""
  monkeypatch.setattr(folder_digests, "_BLOCK_BYTES", 10)
  (tmp_path / "weights" / "d").mkdir(parents=True)
  (tmp_path / "weights" / "d" / "0").write_bytes(bytes(range(35)))
  (tmp_path / "ae.safetensors").write_bytes(b"weights")
  (tmp_path / "sizes.json").write_text("{}")
  path = epath.Path(tmp_path)
  folder_digests.write(path, ["weights", "ae.safetensors", "sizes.json", "no"])
  return path


class TestCheck:
  def test_every_file_has_the_digests_of_its_blocks(self, folder):
    content = json.loads((folder / "digests.json").read_text())
    num_blocks = {
      name: len(fields["blocks"]) for name, fields in content["files"].items()
    }
    assert num_blocks == {
      "weights/d/0": 4,
      "ae.safetensors": 1,
      "sizes.json": 1,
    }
    assert folder_digests.check(folder, are_weights=True)
    assert folder_digests.check(folder, are_weights=False)

  def test_without_digests_nothing_is_verified(self, folder):
    (folder / "digests.json").unlink()
    assert not folder_digests.check(folder, are_weights=True)

  @pytest.mark.parametrize(
    "name, are_weights",
    [("weights/d/0", True), ("ae.safetensors", True), ("sizes.json", False)],
  )
  def test_missing_cut_and_changed_files_are_named(
    self, folder, name, are_weights
  ):
    content = (folder / name).read_bytes()
    changed = bytes([content[0] ^ 1]) + content[1:]
    (folder / name).write_bytes(changed)
    with pytest.raises(ValueError, match=f"damaged: {name} has changed"):
      folder_digests.check(folder, are_weights)
    assert folder_digests.check(folder, not are_weights)
    (folder / name).write_bytes(content[:-1])
    with pytest.raises(ValueError, match=f"{name} has .* bytes, not"):
      folder_digests.check(folder, are_weights)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"damaged: {name} is missing"):
      folder_digests.check(folder, are_weights)

  def test_processes_share_the_blocks(self, folder):
    (folder / "weights" / "d" / "0").write_bytes(bytes(30) + bytes(range(5)))
    failed = []
    for process in range(3):
      try:
        folder_digests.check(folder, are_weights=True, share=(process, 3))
      except ValueError:
        failed.append(process)
    # Blocks, in order: ae.safetensors, then four of which the first three and the last differ.
    assert failed == [0, 1, 2]

  @pytest.mark.parametrize("content", ["", "[]", "{}", '{"check": "0"}'])
  def test_damaged_digests_are_refused(self, folder, content):
    (folder / "digests.json").write_text(content)
    with pytest.raises(ValueError, match="digests.json must be what r3jax"):
      folder_digests.check(folder, are_weights=True)


class TestModel:
  @pytest.fixture
  def model(self, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    pretrained.write_digests(folder)
    return folder

  def test_changed_weights_are_refused_when_they_are_read(self, model):
    path = model / "ae.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    found = pretrained.find(str(model))
    with pytest.raises(ValueError, match="ae.safetensors has changed"):
      found.weights({}, None)

  def test_changed_sizes_are_refused_before_they_are_read(self, model):
    path = model / "llm_config.json"
    path.write_text(path.read_text().replace("1", "2", 1))
    with pytest.raises(ValueError, match="llm_config.json has changed"):
      pretrained.find(str(model))

  def test_the_model_of_the_world_is_verified(self):
    folder = pretrained.find(registry.OF_WORLD, "shapes").folder
    assert folder_digests.check(folder, are_weights=True)

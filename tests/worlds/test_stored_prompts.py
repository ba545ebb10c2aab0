"""Tests of worlds/shapes/stored_prompts.py."""

import pytest

from r3jax.worlds.shapes import prompts
from r3jax.worlds.shapes import stored_prompts
from tests.data import processes

LOAD = """
import sys
from r3jax.worlds.shapes import stored_prompts
records = stored_prompts.load(sys.argv[1], 'heldout')
assert 'tensorflow' not in sys.modules
print(len(records))
"""


class TestLoad:
  def test_splits_equal_the_world(self, tmp_path):
    assert stored_prompts.load(tmp_path, "train") == prompts.train_records()
    assert stored_prompts.load(tmp_path, "heldout") == prompts.heldout_records()

  def test_second_load_reads_what_the_first_prepared(
    self, tmp_path, monkeypatch
  ):
    stored_prompts.load(tmp_path, "heldout")
    monkeypatch.setattr(stored_prompts.Shapes, "_generate_examples", None)
    assert len(stored_prompts.load(tmp_path, "heldout")) == len(
      prompts.heldout_records()
    )

  def test_changed_world_is_prepared_anew(self, tmp_path, monkeypatch):
    stored_prompts.load(tmp_path, "train")
    fewer = prompts.train_records()[:5]
    monkeypatch.setitem(stored_prompts.SPLITS, "train", lambda: fewer)
    assert stored_prompts.load(tmp_path, "train") == fewer

  def test_folder_comes_from_the_environment(self, tmp_path, monkeypatch):
    monkeypatch.setenv("R3JAX_DATA", str(tmp_path / "cache"))
    stored_prompts.load(split="heldout")
    assert list((tmp_path / "cache").glob("*/shapes/1.0.0/dataset_info.json"))

  @pytest.mark.parametrize(
    "name, content",
    [
      ("*.array_record-*", b""),
      ("*.array_record-*", bytes(200_000)),
      ("dataset_info.json", b"{"),
      ("dataset_info.json", b"{}"),
    ],
  )
  def test_damaged_folder_is_passed_over(self, tmp_path, caplog, name, content):
    prompts = stored_prompts.load(tmp_path, "heldout")
    for path in tmp_path.rglob(name):
      path.write_bytes(content)
    with caplog.at_level("WARNING"):
      assert stored_prompts.load(tmp_path, "heldout") == prompts
    assert "is damaged and is not used: " in caplog.text

  def test_world_needs_no_folder(self):
    assert (
      stored_prompts.load("/proc/r3jax", "heldout") == prompts.heldout_records()
    )

  def test_unknown_split_is_refused(self, tmp_path):
    with pytest.raises(ValueError, match="split must be one of .*, got 'test'"):
      stored_prompts.load(tmp_path, "test")

  def test_two_processes_at_once_without_tensorflow(self, tmp_path):
    started = [processes.start(LOAD, tmp_path) for _ in range(2)]
    counts = [processes.result(process) for process in started]
    assert counts == [len(prompts.heldout_records())] * 2

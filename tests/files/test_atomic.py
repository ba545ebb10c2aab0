"""Tests of files/atomic.py."""

from etils import epath
import pytest

from r3jax.files import atomic


def test_replaces_the_file_and_leaves_nothing_beside_it(store):
  folder = epath.Path("gs://bucket/folder")
  path = folder / "notes.json"
  for text in ("first", "second"):
    atomic.write_text(path, text)
    assert path.read_text() == text
  atomic.write_bytes(path, b"third", shared=True)
  assert path.read_bytes() == b"third"
  assert [file.name for file in folder.iterdir()] == ["notes.json"]


def test_keeps_the_old_file_when_the_block_raises(tmp_path):
  path = tmp_path / "notes.json"
  path.write_text("old")
  for shared in (False, True):
    with pytest.raises(RuntimeError), atomic.replacing(path, shared) as partial:
      partial.write_text("ne")
      raise RuntimeError
    assert path.read_text() == "old"


def test_overwrites_what_a_killed_process_left(tmp_path):
  path = tmp_path / "notes.json"
  (tmp_path / "notes.json.partial").write_text("a longer text than the new")
  atomic.write_text(path, "new")
  assert path.read_text() == "new"
  assert [file.name for file in tmp_path.iterdir()] == ["notes.json"]


def test_processes_that_share_a_file_write_to_names_of_their_own(tmp_path):
  path = tmp_path / "notes.json"
  with atomic.replacing(path, shared=True) as first:
    with atomic.replacing(path, shared=True) as second:
      first.write_text("first")
      second.write_text("second")
    assert path.read_text() == "second"
  assert path.read_text() == "first"

"""Tests of io/paths.py, and that Orbax is given the store and not a folder of its name."""

import os
import pathlib

from etils import epath
import jax
import numpy as np
import pytest

from r3jax.checkpoint import orbax_weights
from r3jax.checkpoint import training
from r3jax.files import paths


class TestAbsolute:
  @pytest.mark.parametrize("path", ["gs://bucket/run", "/disk/run"])
  def test_absolute_path_stays(self, path):
    assert (
      str(paths.absolute(path)) == str(paths.absolute(epath.Path(path))) == path
    )

  def test_relative_path_is_of_the_working_directory(self):
    assert str(paths.absolute("runs/a")) == f"{os.getcwd()}/runs/a"


class TestDidYouMean:
  @pytest.mark.parametrize(
    "mistyped, nearest",
    [
      ("runs/shapes/heldout.json", "runs/shapes/heldout.jsonl"),
      ("rums/shapes/heldout.jsonl", "runs"),
      ("runs/shapes/heldout.jsonl", ""),
      ("elsewhere/else", ""),
      ("runs/shapes/heldout.jsonl/x", ""),
      ("x" * 5000, ""),
    ],
  )
  def test_first_part_that_is_missing_is_compared(
    self, tmp_path, mistyped, nearest
  ):
    (tmp_path / "runs" / "shapes").mkdir(parents=True)
    (tmp_path / "runs" / "shapes" / "heldout.jsonl").write_text("")
    suggestion = f"; did you mean {tmp_path / nearest}?" if nearest else ""
    assert paths.did_you_mean(tmp_path / mistyped) == suggestion

  def test_buckets_are_not_listed(self):
    assert paths.did_you_mean("gs://bucket/rum") == ""


class TestOfUser:
  def test_home_stands_for_the_tilde(self, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert str(paths.of_user("~/model")) == "/home/me/model"
    assert str(paths.of_user("~")) == "/home/me"

  @pytest.mark.parametrize("path", ["a/~b", "./~", "/disk/run", "gs://b/~"])
  def test_other_paths_stay(self, path):
    assert str(paths.of_user(path)) == str(epath.Path(path))

  def test_home_that_does_not_exist_is_refused(self):
    with pytest.raises(ValueError, match="none is known; got '~nobody-here/x'"):
      paths.of_user("~nobody-here/x")

  def test_nobody_else_looks_for_homes(self):
    package = pathlib.Path(paths.__file__).parents[1]
    users = {
      str(path.relative_to(package))
      for path in package.rglob("*.py")
      if "expanduser" in path.read_text()
    }
    assert users == {"files/paths.py", "cli/command_line.py"}


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
  """A working directory, which must stay empty."""
  monkeypatch.chdir(tmp_path)
  yield
  assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("elsewhere")
class TestStore:
  def test_latest_complete_checkpoint_is_found(self, store):
    assert training.latest_step("gs://bucket/run/checkpoints") is None
    for step, files in (
      (2, ("_CHECKPOINT_METADATA", "commit_success.txt")),
      (4, ("_CHECKPOINT_METADATA",)),
    ):
      for file in files:
        store.objects[f"gs://bucket/run/checkpoints/{step}/{file}"] = b"{}"
    assert training.latest_step("gs://bucket/run/checkpoints") == 2

  def test_checkpoints_are_written_there(self, store):
    opened = training.Checkpoints("gs://bucket/run/checkpoints", 1, 1)
    assert str(opened._manager.directory) == "gs://bucket/run/checkpoints"
    opened.close()

  def test_weights_are_looked_for_there(self, store):
    wanted = {"policy": jax.ShapeDtypeStruct((2,), np.float32)}
    with pytest.raises(
      ValueError, match="must be at gs://bucket/model/weights"
    ):
      orbax_weights.load("gs://bucket/model/weights", wanted, None)

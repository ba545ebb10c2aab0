"""Tests of io/config_guard.py."""

import json
import os
import pathlib

import pytest

from r3jax.files import config_guard

CONFIG = {
  "seed": 0,
  "total_steps": 10,
  "optimizer": {"betas": (0.9, 0.95), "rate": 5e-6},
  "mesh": {"data": 1},
  "data": {},
}
MAY_DIFFER = ("mesh", "total_steps")


class TestCheckWritable:
  def test_folder_is_made_and_left_empty(self, tmp_path):
    config_guard.check_writable(tmp_path / "a" / "b", "workdir")
    assert list((tmp_path / "a" / "b").iterdir()) == []

  def test_file_in_the_way_is_refused(self, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
      ValueError, match="^--out must be a writable folder, got '.*file'"
    ):
      config_guard.check_writable(tmp_path / "file", "--out")

  def test_read_only_place_is_refused(self):
    with pytest.raises(ValueError, match="workdir must be a writable folder"):
      config_guard.check_writable("/proc/r3jax", "workdir")


class TestWriteOrCheck:
  def test_first_run_writes_the_config(self, tmp_path):
    config_guard.write_or_check(tmp_path, CONFIG, MAY_DIFFER)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["optimizer"] == {"betas": [0.9, 0.95], "rate": 5e-6}
    assert os.listdir(tmp_path) == ["config.json"]

  def test_same_config_passes(self, tmp_path):
    config_guard.write_or_check(tmp_path, CONFIG, MAY_DIFFER)
    config_guard.write_or_check(tmp_path, CONFIG, MAY_DIFFER)

  def test_every_changed_key_is_named_with_both_values(self, tmp_path):
    config_guard.write_or_check(tmp_path, CONFIG, MAY_DIFFER)
    changed = CONFIG | {
      "seed": 1,
      "optimizer": {"betas": (0.9, 0.99)},
      "mesh": {"data": 8},
      "mesh_rules": [1],
    }
    with pytest.raises(ValueError) as error:
      config_guard.write_or_check(tmp_path, changed, MAY_DIFFER)
    assert str(error.value).splitlines()[1:] == [
      "  mesh_rules: <missing> there, [1] now",
      "  optimizer.betas: [0.9, 0.95] there, [0.9, 0.99] now",
      "  optimizer.rate: 5e-06 there, <missing> now",
      "  seed: 0 there, 1 now",
    ]
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 0

  def test_allowed_change_passes_and_is_recorded(self, tmp_path):
    config_guard.write_or_check(tmp_path, CONFIG, MAY_DIFFER)
    config_guard.write_or_check(
      tmp_path,
      CONFIG | {"total_steps": 20, "mesh": {"data": 4, "fsdp": 2}},
      MAY_DIFFER,
    )
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["total_steps"], written["mesh"]) == (
      20,
      {"data": 4, "fsdp": 2},
    )

  @pytest.mark.parametrize(
    "key, may_differ",
    [
      ("reward.members.a.judge.file", True),
      ("reward.members.a.members.b.judge.file", True),
      ("reward.members.a.judge.file.below", True),
      ("reward.members.a.judge.filename", False),
      ("reward.members.a.judge", False),
      ("total_stepsize", False),
    ],
  )
  def test_star_stands_for_any_names(self, key, may_differ):
    allowed = ("reward.members.*.judge.file", "total_steps")
    assert config_guard.agree({key: 1}, {key: 2}, allowed) is may_differ

  def test_other_process_than_0_writes_nothing(self, tmp_path, monkeypatch):
    monkeypatch.setattr(config_guard.jax, "process_index", lambda: 1)
    config_guard.write_or_check(pathlib.Path(tmp_path), CONFIG, MAY_DIFFER)
    assert os.listdir(tmp_path) == []


def test_fixed_values_are_those_that_may_not_differ():
  config = {"seed": 0, "mesh": {"data": 4}, "mesh_rules": (1,)}
  assert config_guard.fixed(config, MAY_DIFFER) == {
    "seed": "0",
    "mesh_rules": "[1]",
  }

"""Tests of data/shapes.py."""

import os
import pathlib
import subprocess
import sys

import pytest

from r3jax.data import shapes
from r3jax.worlds import prompts as world_prompts

ROOT = pathlib.Path(__file__).parents[2]
# Makes Python see no TensorFlow, as on a machine that does not have it.
WITHOUT_TENSORFLOW = """
import importlib.machinery as machinery
find = machinery.PathFinder.find_spec
machinery.PathFinder.find_spec = classmethod(
    lambda cls, name, *args: None if name.split('.')[0] == 'tensorflow' else find(name, *args))
"""
LOAD = """
import sys
from r3jax.data import shapes
records = shapes.load(sys.argv[1], 'heldout')
assert 'tensorflow' not in sys.modules
print(len(records))
"""


def start(code, data_dir):
  environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  return subprocess.Popen([sys.executable, "-c", code, str(data_dir)], env=environment,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def result(process):
  output, errors = process.communicate(timeout=120)
  assert process.returncode == 0, errors
  return int(output.split()[-1])


class TestLoad:

  def test_splits_equal_the_world(self, tmp_path):
    assert shapes.load(tmp_path, "train") == world_prompts.train_records()
    assert shapes.load(tmp_path, "heldout") == world_prompts.heldout_records()

  def test_second_load_reads_what_the_first_prepared(self, tmp_path, monkeypatch):
    shapes.load(tmp_path, "heldout")
    monkeypatch.setattr(shapes, "_examples", None)
    assert len(shapes.load(tmp_path, "heldout")) == len(world_prompts.heldout_records())

  def test_changed_world_is_prepared_anew(self, tmp_path, monkeypatch):
    shapes.load(tmp_path, "train")
    fewer = world_prompts.train_records()[:5]
    monkeypatch.setitem(shapes.SPLITS, "train", lambda: fewer)
    assert shapes.load(tmp_path, "train") == fewer

  def test_folder_comes_from_the_environment(self, tmp_path, monkeypatch):
    monkeypatch.setenv("R3JAX_DATA", str(tmp_path / "cache"))
    shapes.load(split="heldout")
    assert list((tmp_path / "cache").glob("*/shapes/1.0.0/dataset_info.json"))

  def test_unknown_split_is_refused(self, tmp_path):
    with pytest.raises(ValueError, match="split must be one of .*, got 'test'"):
      shapes.load(tmp_path, "test")

  def test_two_processes_at_once_without_tensorflow(self, tmp_path):
    processes = [start(WITHOUT_TENSORFLOW + LOAD, tmp_path) for _ in range(2)]
    counts = [result(process) for process in processes]
    assert counts == [len(world_prompts.heldout_records())] * 2

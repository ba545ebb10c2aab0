"""Tests of sinks.py; Weights & Biases is a fake with the few calls that are made."""

import errno
import json
import os
import sys
import types

from etils import epath
import numpy as np
import pytest
from tensorboard.backend.event_processing import event_accumulator
from tensorboard.util import tensor_util

from configs import r3_geneval
from r3jax.run import sessions
from r3jax.run.logging import sinks

SETTINGS = sinks.WandbSettings(project="r3", name="first", mode="offline")
IMAGE = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
PICTURES = {
  "edit/sample/1": sinks.Picture(IMAGE, "a red ring [colors]: 0.50 -> 1.00")
}


class FakeRun:
  """A run that remembers what it got."""

  def __init__(self, arguments: dict):
    self.arguments, self.logged, self.finished = arguments, [], False

  def log(self, values, step):
    self.logged.append((step, values))

  def finish(self):
    self.finished = True


@pytest.fixture
def wandb(monkeypatch):
  """A fake package; `runs` are those that were started."""
  fake = types.ModuleType("wandb")
  fake.runs = []
  fake.init = lambda **arguments: (
    fake.runs.append(FakeRun(arguments)) or fake.runs[-1]
  )
  fake.Image = lambda image, caption: (image.shape, caption)
  monkeypatch.setitem(sys.modules, "wandb", fake)
  return fake


@pytest.fixture
def missing(monkeypatch):
  """Makes the package missing."""
  monkeypatch.setitem(sys.modules, "wandb", None)


class TestCheck:
  def test_names_the_extra_that_is_missing(self, missing):
    with pytest.raises(
      ValueError, match=r"log.wandb.project needs .*pip install r3jax\[wandb\]"
    ):
      sinks.check(SETTINGS)

  def test_needs_nothing_without_a_project(self, missing):
    sinks.check(sinks.WandbSettings("", "", "online"))

  @pytest.mark.usefixtures("wandb")
  def test_key_comes_from_the_environment(self, monkeypatch):
    online = sinks.WandbSettings("r3", "", "online")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(ValueError, match="WANDB_API_KEY, which is not set"):
      sinks.check(online)
    sinks.check(SETTINGS)
    monkeypatch.setenv("WANDB_API_KEY", "k")
    sinks.check(online)

  def test_refuses_an_unknown_mode(self):
    with pytest.raises(
      ValueError, match="must be 'online' or 'offline'; got 'disabled'"
    ):
      sinks.check(sinks.WandbSettings("", "", "disabled"))

  def test_is_part_of_what_a_run_checks_first(self, missing, tmp_path):
    config = r3_geneval.get_config("shapes")
    config.log.wandb.project = "r3"
    with pytest.raises(ValueError, match="log.wandb.project needs"):
      sessions.prepare(config, str(tmp_path / "workdir"))
    assert not (tmp_path / "workdir").exists()


class TestWandb:
  def test_gets_what_the_file_gets(self, wandb, tmp_path):
    opened = sinks.open_all(tmp_path, None, SETTINGS, {"seed": 3})
    for sink in opened:
      sink.scalars(1, {"reason/score": 0.5})
      sink.pictures(1, PICTURES)
      sink.close()
    (run,) = wandb.runs
    assert run.arguments["config"] == {"seed": 3}
    assert [
      run.arguments[name] for name in ("project", "name", "mode", "dir")
    ] == ["r3", "first", "offline", str(tmp_path)]
    assert run.logged == [
      (1, {"reason/score": 0.5}),
      (1, {"edit/sample/1": ((2, 3, 3), "a red ring [colors]: 0.50 -> 1.00")}),
    ]
    assert run.finished
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
      "step": 1,
      "reason/score": 0.5,
    }

  def test_resumed_run_goes_on_with_the_same_id(self, wandb, tmp_path):
    for workdir, restored in (("one", None), ("one", 4), ("two", None)):
      sinks.open_all(tmp_path / workdir, restored, SETTINGS)
    ids = [run.arguments["id"] for run in wandb.runs]
    assert ids[0] == ids[1] != ids[2]
    assert all(run.arguments["resume"] == "allow" for run in wandb.runs)

  def test_writes_to_a_disk_where_the_workdir_is_in_a_bucket(
    self, wandb, store
  ):
    sinks.Wandb(epath.Path("gs://bucket/run"), SETTINGS, {})
    assert "://" not in wandb.runs[0].arguments["dir"]
    assert (
      store.objects["gs://bucket/run/wandb_id"].decode()
      == wandb.runs[0].arguments["id"]
    )

  def test_is_off_without_a_project(self, wandb, tmp_path):
    opened = sinks.open_all(
      tmp_path, None, sinks.WandbSettings("", "", "online")
    )
    assert [type(sink) for sink in opened] == [
      sinks.JsonLines,
      sinks.TensorBoard,
    ] and not wandb.runs
    assert not (tmp_path / "wandb_id").exists()


class TestJsonLines:
  def test_evaluations_have_a_file_of_their_own_and_are_replaced_when_made_anew(
    self, tmp_path
  ):
    def lines():
      return [
        json.loads(line)
        for line in (tmp_path / "evaluation.jsonl").read_text().splitlines()
      ]

    sink = sinks.JsonLines(epath.Path(tmp_path), None)
    for step, value in ((0, 0.1), (20, 0.2), (0, 0.1), (0, 0.9)):
      sink.evaluation(step, {"evaluation/draft": value})
    assert lines() == [
      {"step": 0, "evaluation/draft": 0.9},
      {"step": 20, "evaluation/draft": 0.2},
    ]
    sinks.JsonLines(epath.Path(tmp_path), 10).evaluation(
      20, {"evaluation/draft": float("nan")}
    )
    assert lines() == [
      {"step": 0, "evaluation/draft": 0.9},
      {"step": 20, "evaluation/draft": None},
    ]


class TestTensorBoard:
  def test_keeps_pictures_with_their_captions(self, tmp_path):
    sink = sinks.TensorBoard(epath.Path(tmp_path), None)
    sink.pictures(2, PICTURES)
    sink.close()
    events = event_accumulator.EventAccumulator(
      str(tmp_path / "tensorboard")
    ).Reload()

    def read(name):
      return tensor_util.make_ndarray(events.Tensors(name)[0].tensor_proto)

    assert (
      read("edit/sample/1/caption").item().decode()
      == PICTURES["edit/sample/1"].caption
    )
    width, height, png = read("edit/sample/1")
    assert (width, height, png[:4]) == (b"3", b"2", b"\x89PNG")

  def test_full_disk_is_an_error_of_the_disk_that_names_the_file(
    self, tmp_path, monkeypatch
  ):
    """Not one of the thread that writes."""
    sink = sinks.TensorBoard(epath.Path(tmp_path), None)

    def fails(*_):
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(epath.Path("/tmp").__class__, "open", fails)
    sink.scalars(1, {"reason/score": 0.5})
    with pytest.raises(
      OSError, match="No space left .*events.out.tf"
    ) as raised:
      sink.close()
    assert raised.value.errno == errno.ENOSPC

  @staticmethod
  def _start(workdir, restored, steps, offset):
    sink = sinks.TensorBoard(epath.Path(workdir), restored)
    sink.evaluation(0, {"evaluation/draft": 0.25, "evaluation/gain": np.nan})
    for step in steps:
      sink.scalars(step, {"reason/score": offset + step})
    sink.close()

  @staticmethod
  def _points(workdir, name):
    """Returns step and value of a curve, over all files in their order."""
    events = event_accumulator.EventAccumulator(
      str(workdir / "tensorboard"),
      size_guidance={event_accumulator.TENSORS: 0},
      purge_orphaned_data=False,
    )
    return [
      (event.step, float(tensor_util.make_ndarray(event.tensor_proto)))
      for event in events.Reload().Tensors(name)
    ]

  def test_resumed_run_shows_every_iteration_once(self, tmp_path):
    self._start(tmp_path, None, range(1, 16), 0.0)
    (killed,) = (tmp_path / "tensorboard").iterdir()
    with killed.open("ab") as file:
      file.write(b"cut off")
    self._start(tmp_path, 10, range(11, 21), 0.5)
    assert self._points(tmp_path, "reason/score") == [
      *((step, float(step)) for step in range(1, 11)),
      *((step, step + 0.5) for step in range(11, 21)),
    ]
    ((step, value),) = self._points(tmp_path, "evaluation/draft")
    assert (step, value) == (0, 0.25)

  def test_run_that_starts_over_shows_nothing_of_the_former(self, tmp_path):
    self._start(tmp_path, None, range(1, 4), 0.0)
    self._start(tmp_path, None, range(1, 3), 0.5)
    assert self._points(tmp_path, "reason/score") == [(1, 1.5), (2, 2.5)]


class TestOpenAll:
  def test_only_the_first_process_has_any(self, monkeypatch, tmp_path):
    monkeypatch.setattr(sinks.jax, "process_index", lambda: 1)
    assert sinks.open_all(tmp_path / "workdir", None, SETTINGS) == []
    assert not (tmp_path / "workdir").exists()

"""Tests of stages: an interrupted one ends where an uninterrupted one does."""

import dataclasses
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from r3jax.sft import fitting
from r3jax.sft import stages

SCHEDULE = fitting.Schedule(
  num_steps=12, batch_size=8, learning_rate=0.1, warmup=2
)


class Killed(Exception):
  """What a killed process would not survive."""


def _loss(params, batch, key):
  del key  # nothing is drawn
  value = jnp.mean((params["x"] - batch) ** 2)
  return value, {"loss": value}


def _example(number: int) -> np.float32:
  return np.float32(np.sin(number))


def _stage(folder: pathlib.Path, **changes) -> stages.Stage:
  watchers = stages.Watchers(log_every=3, save_every=5, measure_every=4)
  watchers = dataclasses.replace(watchers, **changes)
  return stages.Stage(folder, "toy", SCHEDULE, watchers)


def _fit(stage: stages.Stage) -> float:
  params = {"x": jnp.float32(2.0)}
  return float(stage.fit(_loss, params, _example, seed=0)["x"])


def _measure(step, params):
  return {"x": float(params["x"]), "half": step / 2}


class TestStage:
  def test_interrupted_run_ends_as_an_uninterrupted_one(self, tmp_path):
    whole = tmp_path / "whole"
    killed = tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    expected = _fit(_stage(whole, measure=_measure))

    def die(step, params):
      if step == 8:
        raise Killed
      return _measure(step, params)

    with pytest.raises(Killed):
      _fit(_stage(killed, measure=die))
    assert stages.record(killed, "toy").step == 5
    assert _fit(_stage(killed, measure=_measure)) == expected
    records = [stages.record(folder, "toy") for folder in (whole, killed)]
    assert [record.scores for record in records] == [records[0].scores] * 2
    assert [record.losses for record in records] == [records[0].losses] * 2
    assert [row["step"] for row in records[1].losses] == [3, 6, 9, 12]
    assert [row["step"] for row in records[1].scores] == [4, 8, 12]

  def test_finished_stage_is_not_trained_again(self, tmp_path):
    expected = _fit(_stage(tmp_path))
    assert stages.record(tmp_path, "toy").is_finished

    def refuse(step, params):
      raise Killed

    stage = _stage(tmp_path, measure=refuse, measure_every=1)
    assert _fit(stage) == expected

  def test_ends_where_scores_are_enough(self, tmp_path):
    saved = []
    stage = _stage(
      tmp_path,
      measure=_measure,
      is_enough=lambda scores: scores["half"] >= 4,
      save=saved.append,
    )
    _fit(stage)
    record = stages.record(tmp_path, "toy")
    assert record.step == 8 and record.is_finished
    assert len(saved) == 2  # at steps 5 and 8

  def test_damaged_file_is_named(self, tmp_path):
    (tmp_path / "toy.msgpack").write_bytes(b"\x93junk")
    with pytest.raises(ValueError, match="toy.msgpack must be the state of"):
      _fit(_stage(tmp_path))

  def test_file_of_another_model_is_named(self, tmp_path):
    _fit(_stage(tmp_path))
    stage = _stage(tmp_path)
    with pytest.raises(ValueError, match="toy.msgpack must be the state of"):
      stage.fit(_loss, {"y": jnp.float32(0.0)}, _example, seed=0)

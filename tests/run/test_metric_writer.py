"""Tests of run/logging/metric_writer.py."""

import json
import sys

import jax.numpy as jnp
from tensorboard.backend.event_processing import event_accumulator
from tensorboard.util import tensor_util

from r3jax.run.logging import metric_writer
from r3jax.run.logging import sinks


def run(workdir, steps, restored_step=None):
  writer = metric_writer.MetricWriter(sinks.open_all(workdir, restored_step))
  for step in steps:
    writer.write(
      step,
      {
        "reward": jnp.float32(step / 4),
        "loss": float("nan") if step == 2 else 1,
      },
    )
  writer.close()
  return (workdir / "metrics.jsonl").read_text()


class TestMetricWriter:
  def test_a_line_is_one_json_object_a_step(self, tmp_path):
    lines = run(tmp_path, [1, 2]).splitlines()
    assert [json.loads(line) for line in lines] == [
      {"step": 1, "loss": 1.0, "reward": 0.25},
      {"step": 2, "loss": None, "reward": 0.5},
    ]

  def test_lines_are_on_disk_before_close(self, tmp_path):
    writer = metric_writer.MetricWriter(sinks.open_all(tmp_path, None))
    writer.write(1, {"reward": float("inf")})
    assert (
      tmp_path / "metrics.jsonl"
    ).read_text() == '{"step": 1, "reward": null}\n'
    writer.close()

  def test_resumed_equals_uninterrupted(self, tmp_path):
    uninterrupted = run(tmp_path / "one", range(1, 9))
    run(tmp_path / "two", range(1, 6))
    with (tmp_path / "two" / "metrics.jsonl").open("a") as file:
      file.write('{"step": 6, "rew')  # Killed while writing.
    assert run(tmp_path / "two", range(4, 9), restored_step=3) == uninterrupted

  def test_start_over_drops_every_line(self, tmp_path):
    run(tmp_path, [0, 1, 2])
    assert run(tmp_path, [0]).count("\n") == 1

  def test_tensorboard_gets_the_scalars(self, tmp_path):
    run(tmp_path, [1, 3])
    events = event_accumulator.EventAccumulator(
      str(tmp_path / "tensorboard")
    ).Reload()
    rewards = [
      (event.step, float(tensor_util.make_ndarray(event.tensor_proto)))
      for event in events.Tensors("reward")
    ]
    assert rewards == [(1, 0.25), (3, 0.75)]

  def test_tensorboard_needs_no_tensorflow(self, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    run(tmp_path, [1])
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1

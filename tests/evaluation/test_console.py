"""Tests of evaluation/console.py."""

import time

from r3jax.evaluation import console


class TestHeartbeat:
  def test_lines_come_while_the_main_thread_is_busy(self, caplog):
    with (
      caplog.at_level("INFO", logger="absl"),
      console.heartbeat("compiling", "minutes", every=0.01),
    ):
      time.sleep(0.1)
    first, *beats, last = caplog.messages
    assert first == "compiling (minutes)"
    assert len(beats) >= 2
    assert set(beats) == {"still compiling: 0:00:00 so far"}
    assert last.startswith("done compiling: 0.1")

  def test_a_phase_that_fails_ends_its_thread(self, caplog):
    with caplog.at_level("INFO", logger="absl"):
      try:
        with console.heartbeat("compiling", every=0.01):
          raise ValueError("no")
      except ValueError:
        pass
      num_lines = len(caplog.messages)
      time.sleep(0.05)
    assert len(caplog.messages) == num_lines


class TestEvaluationProgress:
  def test_time_left_leaves_out_the_batch_that_compiles(self):
    times = iter([0.0, 60.0, 80.0, 85.0, 90.0])
    progress = console.EvaluationProgress(
      total=120, done=20, clock=lambda: next(times)
    )
    assert progress.add(25) == "evaluated 45/120 samples"
    assert progress.add(25) == "evaluated 70/120 samples  ETA 0:00:40"
    # five seconds after the last line
    assert progress.add(25) == ""
    assert progress.add(25) == "evaluated 120/120 samples  ETA 0:00:00"

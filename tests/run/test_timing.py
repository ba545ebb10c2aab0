"""Tests of run/logging/timing.py."""

import pytest

from r3jax.run.logging import timing


class TestPhaseClock:
  def test_a_phase_that_recurs_is_added_up(self, monkeypatch):
    times = iter([0.0, 1.0, 3.0, 7.0])
    monkeypatch.setattr(timing.time, "monotonic", lambda: next(times))
    clock = timing.PhaseClock()
    assert [clock.lap(phase) for phase in ("a", "b", "a")] == [1.0, 2.0, 4.0]
    assert clock.seconds == {"a": 5.0, "b": 2.0}


class TestStopwatch:
  def test_adds_up_the_parts_since_the_last_reading(self):
    times = iter([0.0, 2.0, 3.0, 3.5, 10.0, 14.0])
    stopwatch = timing.Stopwatch(clock=lambda: next(times))
    for name in ("step", "log", "step"):
      with stopwatch.part(name):
        pass
    assert stopwatch.read() == {"seconds/step": 6.0, "seconds/log": 0.5}
    assert stopwatch.read() == {}


class TestEvaluations:
  @pytest.mark.parametrize(
    ("every", "step", "count"),
    [(0, 1, 1), (0, 10, 1), (4, 1, 3), (4, 4, 3), (4, 5, 2), (4, 10, 1)],
  )
  def test_those_that_follow_are_counted(self, every, step, count):
    evaluations = timing.Evaluations(seconds=1.0, every=every)
    assert evaluations.num_left(step, total_steps=10) == count


class TestProgress:
  def test_time_left_leaves_out_the_iteration_that_compiles(self):
    evaluations = timing.Evaluations(seconds=30.0)
    progress = timing.Progress(total_steps=10, evaluations=evaluations)
    assert progress.report(1, 60.0, {"reason": 0.5}, "") == (
      "iteration 1/10  reason 0.500  60.00 s/it  ETA after the next"
    )
    # eight iterations, and the evaluation after the last
    assert progress.report(2, 2.0, {}, "") == (
      "iteration 2/10  2.00 s/it  ETA 0:00:46"
    )
    assert progress.report(3, 4.0, {}, "") == (
      "iteration 3/10  4.00 s/it  ETA 0:00:51"
    )

  def test_last_iteration_leaves_the_last_evaluation(self):
    evaluations = timing.Evaluations(seconds=61.0)
    progress = timing.Progress(total_steps=1, evaluations=evaluations)
    assert progress.report(1, 60.0, {}, "").endswith("ETA 0:01:01")

  def test_resumed_run_counts_from_its_own_first_step(self):
    progress = timing.Progress(1000, timing.Evaluations())
    assert progress.report(7, 100.0, {}, "").endswith("ETA after the next")
    assert progress.report(8, 2.0, {}, "") == (
      "iteration 8/1000  2.00 s/it  ETA 0:33:04"
    )

  def test_missing_score_has_its_reason(self):
    progress = timing.Progress(10, timing.Evaluations())
    scores = {"draft": float("nan"), "edited": 0.5}
    line = progress.report(1, 1.0, scores, "no score: HTTP 503")
    assert line == (
      "iteration 1/10  draft missing  edited 0.500  1.00 s/it  "
      "ETA after the next  no score: HTTP 503"
    )

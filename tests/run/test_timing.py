"""Tests of run/logging/timing.py."""

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


class TestProgress:
  def test_time_left_leaves_out_the_iteration_that_compiles(self):
    times = iter([0.0, 60.0, 62.0, 66.0])
    progress = timing.Progress(total_steps=10, clock=lambda: next(times))
    assert progress.report(1, {"reason": 0.5}) == (
      "iteration 1/10  reason 0.500  60.00 s/it  ETA 0:09:00"
    )
    assert progress.report(2, {}) == "iteration 2/10  2.00 s/it  ETA 0:00:16"
    assert progress.report(3, {}) == "iteration 3/10  4.00 s/it  ETA 0:00:21"

  def test_resumed_run_counts_from_its_own_first_step(self):
    times = iter([100.0, 104.0, 4000.0])
    progress = timing.Progress(
      total_steps=1000, done_steps=6, clock=lambda: next(times)
    )
    assert progress.report(8, {}) == "iteration 8/1000  2.00 s/it  ETA 0:33:04"

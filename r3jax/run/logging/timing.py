"""Measures the phases of a run and the parts of an iteration, and estimates the time left."""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import time

from absl import logging
import jax


class PhaseClock:
  """Measures the consecutive phases of a run: setup, compile, train, ...

  Attributes:
    seconds: Total time of every phase, by its name.
  """

  def __init__(self):
    """Starts the first phase."""
    self.seconds: dict[str, float] = {}
    self._phase_start = time.monotonic()

  def lap(self, phase: str) -> float:
    """Ends a phase and starts the next one.

    Args:
      phase: Name of the phase that ends; a phase may recur.

    Returns:
      The seconds since the last lap.
    """
    now = time.monotonic()
    elapsed = now - self._phase_start
    self._phase_start = now
    self.seconds[phase] = self.seconds.get(phase, 0.0) + elapsed
    return elapsed


class Stopwatch:
  """Measures the parts of an iteration."""

  def __init__(self, clock: Callable[[], float] = time.monotonic):
    """Starts at zero.

    Args:
      clock: Returns seconds.
    """
    self._clock = clock
    self._seconds: dict[str, float] = {}

  @contextlib.contextmanager
  def part(self, name: str) -> Iterator[None]:
    """Adds the seconds that the block takes to a part."""
    start = self._clock()
    yield
    elapsed = self._clock() - start
    self._seconds[name] = self._seconds.get(name, 0.0) + elapsed

  def read(self) -> dict[str, float]:
    """Returns the seconds of every part by "seconds/NAME", and resets them."""
    metrics = {
      f"seconds/{name}": elapsed for name, elapsed in self._seconds.items()
    }
    self._seconds = {}
    return metrics


@dataclasses.dataclass(frozen=True)
class _Mark:
  """When an iteration ended."""

  step: int
  seconds: float


class Progress:
  """Logs how far a run is and when it will be done; only process 0 logs."""

  def __init__(
    self,
    total_steps: int,
    done_steps: int = 0,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Starts the clock.

    Args:
      total_steps: Number of iterations of the whole run.
      done_steps: Number of iterations that earlier starts have completed.
      clock: Returns seconds.
    """
    self._total_steps = total_steps
    self._clock = clock
    self._last = _Mark(done_steps, clock())
    self._first_report: _Mark | None = None

  def report(self, step: int, scores: Mapping[str, float]) -> str:
    """Logs an iteration: its scores, its seconds, and the time left.

    The time left is estimated from the mean iteration since the first report: the iteration before
    it may have compiled.

    Args:
      step: Number of the iteration.
      scores: Numbers to log, by name.

    Returns:
      The line.
    """
    now = _Mark(step, self._clock())
    seconds = _seconds_per_step(self._last, now)
    mean_seconds = seconds
    if self._first_report is None:
      self._first_report = now
    else:
      mean_seconds = _seconds_per_step(self._first_report, now)
    self._last = now

    seconds_left = mean_seconds * (self._total_steps - step)
    formatted = "".join(
      f"{name} {score:.3f}  " for name, score in scores.items()
    )
    line = (
      f"iteration {step}/{self._total_steps}  {formatted}"
      f"{seconds:.2f} s/it  ETA {_hours_minutes_seconds(seconds_left)}"
    )
    if jax.process_index() == 0:
      logging.info("%s", line)
    return line


def _seconds_per_step(start: _Mark, end: _Mark) -> float:
  return (end.seconds - start.seconds) / (end.step - start.step)


def _hours_minutes_seconds(seconds: float) -> str:
  """Formats a duration as h:mm:ss."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}"

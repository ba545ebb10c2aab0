"""Writes a run's metrics, takes the time, and says how far the run is."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import time
from typing import Any

from absl import logging
import jax
import numpy as np

from r3jax.run.logging import sinks


class MetricWriter:
  """Hands what an iteration logs to every sink; see `sinks.open_all`, which gives only process 0 some."""

  def __init__(self, opened: Sequence[sinks.Sink]):
    """Takes over the sinks."""
    self._sinks = opened

  def write(self, step: int, metrics: Mapping[str, Any]):
    """Writes the scalars of a step."""
    scalars = {
      name: float(np.asarray(value)) for name, value in sorted(metrics.items())
    }
    for sink in self._sinks:
      sink.scalars(step, scalars)

  def write_evaluation(self, step: int, numbers: Mapping[str, float]):
    """Writes the numbers of an evaluation after a step; of a resumed run again those that it does not repeat."""
    for sink in self._sinks:
      sink.evaluation(step, numbers)

  def write_pictures(self, step: int, pictures: Mapping[str, sinks.Picture]):
    """Writes the pictures of a step, whose scalars come first."""
    for sink in self._sinks:
      sink.pictures(step, pictures)

  def close(self):
    """Completes what is still being written."""
    for sink in self._sinks:
      sink.close()


class Stopwatch:
  """Adds up the seconds of the parts of an iteration."""

  def __init__(self, clock: Callable[[], float] = time.monotonic):
    """Starts with nothing; `clock` returns seconds."""
    self._clock, self._seconds = clock, {}

  @contextlib.contextmanager
  def part(self, name: str) -> Iterator[None]:
    """Books the block's seconds on a part."""
    start = self._clock()
    yield
    self._seconds[name] = self._seconds.get(name, 0.0) + self._clock() - start

  def read(self) -> dict[str, float]:
    """Returns the seconds since the last reading, by "seconds/NAME"."""
    seconds, self._seconds = self._seconds, {}
    return {f"seconds/{name}": spent for name, spent in seconds.items()}


class Progress:
  """Logs, from process 0, how far a run is and when it will be done."""

  def __init__(
    self,
    total_steps: int,
    done_steps: int = 0,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Starts the clock.

    Args:
      total_steps: iterations of the whole run.
      done_steps: iterations of an earlier session that this one goes on from.
      clock: returns seconds.
    """
    self._total_steps, self._clock = total_steps, clock
    self._last = (done_steps, clock())  # (step, time) of the last report.
    # The same of the first one: by then all is compiled.
    self._warm = None

  def report(self, step: int, rewards: Mapping[str, float]) -> str:
    """Logs and returns the line of a step: rewards, seconds per iteration and the time left.

    The time left rests on the mean of the session's iterations without the first, which compiles.
    """
    now = (step, self._clock())
    seconds = _seconds_per_step(self._last, now)
    mean_seconds = _seconds_per_step(self._warm, now) if self._warm else seconds
    self._last, self._warm = now, self._warm or now
    numbers = "".join(
      f"{name} {value:.3f}  " for name, value in rewards.items()
    )
    line = (
      f"iteration {step}/{self._total_steps}  {numbers}{seconds:.2f} s/it  "
      f"ETA {_clock_time(mean_seconds * (self._total_steps - step))}"
    )
    if jax.process_index() == 0:
      logging.info("%s", line)
    return line


def _seconds_per_step(
  start: tuple[int, float], end: tuple[int, float]
) -> float:
  return (end[1] - start[1]) / (end[0] - start[0])


def _clock_time(seconds: float) -> str:
  """Returns h:mm:ss."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}"

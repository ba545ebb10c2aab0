"""Measures the phases of a run and the parts of an iteration, and estimates the time left."""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import math
import time

from absl import logging
import jax

from r3jax.evaluation import console


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
class Evaluations:
  """The evaluations of a run that follow its iterations.

  Attributes:
    seconds: Time of one, without compilation.
    every: Number of iterations between two of them; 0 has only that after the last iteration.
  """

  seconds: float = 0.0
  every: int = 0

  def num_left(self, step: int, total_steps: int) -> int:
    """Returns how many follow: those after iteration `step` and later ones, the last included."""
    if not self.every:
      return 1
    between = (total_steps - 1) // self.every - (step - 1) // self.every
    return 1 + max(between, 0)


class Progress:
  """Logs how far a run is and when it will be done; only process 0 logs."""

  def __init__(self, total_steps: int, evaluations: Evaluations):
    """Starts without any iteration.

    Args:
      total_steps: Number of iterations of the whole run.
      evaluations: Evaluations that are made meanwhile and afterwards.
    """
    self._total_steps = total_steps
    self._evaluations = evaluations
    self._num_reports = 0
    self._steady_seconds = 0.0  # of all iterations of this start but the first

  def report(
    self, step: int, seconds: float, scores: Mapping[str, float], remark: str
  ) -> str:
    """Logs an iteration: its scores, its seconds, and the time until the run is done.

    That is the mean iteration times those that are left, and the evaluations that follow. The first
    iteration of a start does not count, because it may have compiled; until the second one nothing
    is known, unless no iteration is left.

    Args:
      step: Number of the iteration.
      seconds: Time of the iteration, without evaluations.
      scores: Numbers to log, by name; NaN where there is none.
      remark: What a reader must know of this iteration, "" for nothing.

    Returns:
      The line.
    """
    self._num_reports += 1
    if self._num_reports > 1:
      self._steady_seconds += seconds
    steps_left = self._total_steps - step
    seconds_left = self._evaluations.seconds * self._evaluations.num_left(
      step, self._total_steps
    )
    eta = "after the next"
    if self._num_reports > 1 or not steps_left:
      mean_seconds = self._steady_seconds / max(self._num_reports - 1, 1)
      seconds_left += mean_seconds * steps_left
      eta = console.duration(seconds_left)

    formatted = ""
    for name, score in scores.items():
      shown = f"{score:.3f}" if math.isfinite(score) else "missing"
      formatted += f"{name} {shown}  "
    line = (
      f"iteration {step}/{self._total_steps}  {formatted}"
      f"{seconds:.2f} s/it  ETA {eta}"
    )
    if remark:
      line += f"  {remark}"
    if jax.process_index() == 0:
      logging.info("%s", line)
    return line

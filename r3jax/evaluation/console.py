"""Logs that work which takes minutes goes on, and when it will be done; only process 0 logs."""

from collections.abc import Callable, Iterator
import contextlib
import sys
import threading
import time

from absl import logging
import jax

_HEARTBEAT_SECONDS = 15.0
_LINE_SECONDS = 10.0  # between two lines of an evaluation


def duration(seconds: float) -> str:
  """Returns a duration as h:mm:ss."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}"


@contextlib.contextmanager
def heartbeat(
  phase: str, expectation: str = "", every: float = _HEARTBEAT_SECONDS
) -> Iterator[None]:
  """Logs the beginning of a phase, that it goes on, and how long it took.

  Args:
    phase: What is done, for example "compiling the step".
    expectation: How long that takes, "" where nothing is known.
    every: Seconds between two lines.
  """
  if jax.process_index():
    yield
    return
  start = time.monotonic()
  logging.info("%s%s", phase, f" ({expectation})" if expectation else "")
  with reminders(phase, logging.info, every):
    yield
  logging.info("done %s: %.1f s", phase, time.monotonic() - start)


@contextlib.contextmanager
def reminders(
  phase: str, say: Callable[[str], None], every: float = _HEARTBEAT_SECONDS
) -> Iterator[None]:
  """Says again and again that a phase goes on.

  A thread does, because the main thread sits in a compiler or waits for a device meanwhile.

  Args:
    phase: What is done, for example "drawing".
    say: Is called with a line.
    every: Seconds between two lines.
  """
  start = time.monotonic()
  is_over = threading.Event()

  def remind() -> None:
    while not is_over.wait(every):
      passed = duration(time.monotonic() - start)
      say(f"still {phase}: {passed} so far")

  thread = threading.Thread(target=remind, daemon=True)
  thread.start()
  try:
    yield
  finally:
    is_over.set()
    thread.join()


def print_line(line: str) -> None:
  """Prints a line for people, beside what a command answers."""
  print(line, file=sys.stderr, flush=True)


class EvaluationProgress:
  """Logs how many samples of an evaluation are drawn and scored, and when the rest will be."""

  def __init__(
    self,
    total: int,
    done: int,
    unit: str = "samples",
    clock: Callable[[], float] = time.monotonic,
  ):
    """Starts the clock.

    Args:
      total: Number of samples, or of something else.
      done: Number of those that an earlier start has drawn.
      unit: What is counted.
      clock: Returns seconds.
    """
    self._unit = unit
    self._total = total
    self._done = done
    self._clock = clock
    self._last_line = clock()
    # Number and time at the end of the first batch, which may have compiled.
    self._first: tuple[int, float] | None = None

  def waiting_for_the_first(self) -> contextlib.AbstractContextManager[None]:
    """Returns a context with a heartbeat while the first batch is drawn, else one without."""
    if self._first is not None:
      return contextlib.nullcontext()
    return heartbeat(
      "evaluating the first batch", "it waits for the compiler or its cache"
    )

  def add(self, count: int) -> str:
    """Logs that a batch is done, unless the last line is some seconds old only.

    Args:
      count: Number of its samples.

    Returns:
      The line; "" where none was due.
    """
    now = self._clock()
    self._done += count
    eta = ""
    if self._first is None:
      self._first = (self._done, now)
    else:
      first_done, first_time = self._first
      seconds_each = (now - first_time) / (self._done - first_done)
      seconds_left = seconds_each * (self._total - self._done)
      eta = f"  ETA {duration(seconds_left)}"
    is_last = self._done >= self._total
    if now - self._last_line < _LINE_SECONDS and not is_last:
      return ""
    self._last_line = now
    line = f"evaluated {self._done}/{self._total} {self._unit}{eta}"
    if jax.process_index() == 0:
      logging.info("%s", line)
    return line

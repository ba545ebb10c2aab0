"""Keeps the report page of a run that goes on up to date, for less than 1 % of its time."""

from collections.abc import Callable
import datetime
import time

import jax

from r3jax.report import run_page
from r3jax.run import machine
from r3jax.run import sessions
from r3jax.run import summary

# Least time between two pages, in times that of writing one: the page costs below 1 % of a run.
_PAUSE = 100.0
_DEFAULT_EVERY = 10  # iterations, where no samples are logged


class LiveReport:
  """Writes the page after the first iteration of a start, and then every `log.samples_every`.

  A page that is due sooner than 100 times the time that the last one took is left out. Only process
  0 writes.
  """

  def __init__(
    self,
    session: sessions.Session,
    write: Callable[[int], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Writes nothing yet.

    Args:
      session: Constants of the run.
      write: Writes the page after an iteration; None writes that of the run.
      clock: Returns seconds.
    """
    self._session = session
    self._write = write or self._write_page
    self._clock = clock
    self._every = session.config.log.samples_every or _DEFAULT_EVERY
    self._next_time: float | None = None
    self._start = machine.start()

  def update(self, number: int) -> None:
    """Writes the page after an iteration, if it is due."""
    if jax.process_index():
      return
    start = self._clock()
    if self._next_time is not None:
      is_early = start < self._next_time
      if is_early or number % self._every:
        return
    self._write(number)
    end = self._clock()
    self._next_time = end + _PAUSE * (end - start)

  def _write_page(self, number: int) -> None:
    """Writes the page of a run after iteration `number`."""
    config = self._session.config
    total = config.total_steps
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    state = (
      f"Iteration {number} of {total}, written {now}. The page is written again every "
      f"{self._every} iterations at most; reload it for newer numbers."
    )
    so_far = run_page.RunSummary(
      title=summary.title(self._session),
      leaked=self._session.leaked,
      skipped_updates=summary.skipped_updates(self._session.files),
      iterations=number,
      seed=config.seed,
      versions=machine.versions(),
      start=self._start,
    )
    summary.write_page(self._session, so_far, state)

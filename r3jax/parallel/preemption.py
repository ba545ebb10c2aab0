"""Ends this process when it is asked to: by a signal, or by another process of its run.

SIGTERM, SIGINT and SIGHUP (the terminal is closed) ask it.

The main thread sits in compilations and computations for minutes, and Python runs no signal handler
meanwhile. A thread therefore reads the signals. It ends the process itself where nothing has to be
saved: while a command starts, loads, compiles or evaluates. In the loop of a run the main thread
finishes the iteration, saves and raises SystemExit; the thread ends the process where that takes
longer than `grace_seconds`, or where a second signal arrives. The exit code is EXIT_CODE each time.

JAX is not imported here, so that a command can listen before it imports JAX.
"""

import atexit
from collections.abc import Collection
import os
import select
import signal
import threading
import time

from r3jax.parallel import endings

# EX_TEMPFAIL of sysexits.h: what was asked for is not done; try again.
EXIT_CODE = 75
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Position of a process that has nothing to save, and decision to end at once.
AT_ONCE = 0
# A signal that follows sooner is the same one: `timeout` signals its child and then its group.
_ANOTHER_SIGNAL_SECONDS = 1.0
# How long the thread that talks to the other processes may take to end this one.
FAREWELL_SECONDS = 4.0
_WAKE = b"\0"  # no number of a signal


class Ending:
  """When and how this process ends after it was asked to.

  A process is at a position: the number of the iteration that it will save next, or AT_ONCE while
  it has nothing to save. Several processes agree on the largest position of all, see
  `parallel.agreement`; one that is alone takes its own.

  Attributes:
    grace_seconds: Time for the iteration and its checkpoint after the first signal.
  """

  def __init__(self, clock=time.monotonic, exit_process=endings.end_now):
    """Starts with nothing to save.

    Args:
      clock: Returns seconds.
      exit_process: Ends the process with a code, from any thread, within seconds.
    """
    self.grace_seconds = 100.0
    self._clock = clock
    self._exit_process = exit_process
    self._condition = threading.Condition()
    self._position = AT_ONCE
    self._how_to_go_on = ""
    self._is_together = False
    self._asked_by = ""
    self._asked_at: float | None = None
    self._at_once_since: float | None = None
    # Iteration after which the process ends, or AT_ONCE; None until that is decided.
    self._decision: int | None = None
    self._pipe: int | None = None
    self._numbers: tuple[signal.Signals, ...] = ()

  # What the main thread calls.

  def listen(self, how_to_go_on: str) -> None:
    """Reads signals from now on; must be called in the main thread.

    A SIGHUP that `nohup` has switched off stays so.

    Args:
      how_to_go_on: What the user can do after the end, for the messages.
    """
    self._how_to_go_on = how_to_go_on
    reader, self._pipe = os.pipe()
    os.set_blocking(self._pipe, False)
    outlives_terminal = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    self._numbers = _SIGNALS[:-1] if outlives_terminal else _SIGNALS
    # The C handler writes the signal's number, whatever the main thread is doing.
    signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
    self.claim_signals()
    threading.Thread(target=self._watch, args=(reader,), daemon=True).start()
    # JAX is imported later, so this runs when JAX has taken leave of the other processes.
    atexit.register(self._ignore_signals)

  def claim_signals(self) -> None:
    """Sets the signals' handlers again: runtimes of accelerators set their own when they start."""
    if self._pipe is None:
      return
    for number in self._numbers:
      signal.signal(number, _leave_to_thread)

  def leave_signals(self) -> None:
    """Reads no signals any more; must be called in the main thread.

    Handlers that others have set since `listen` stay; signals without one end the process again.
    """
    signal.set_wakeup_fd(-1)
    for number in self._numbers:
      if signal.getsignal(number) is _leave_to_thread:
        signal.signal(number, signal.SIG_DFL)
    self._numbers = ()

  def _ignore_signals(self) -> None:
    """Ignores the signals: all is done, and Python would let them kill the process meanwhile."""
    for number in self._numbers:
      signal.signal(number, signal.SIG_IGN)

  def will_save(self, iteration: int) -> None:
    """Notes that there is something to save once an iteration is done."""
    with self._condition:
      self._position = iteration

  def nothing_to_save(self) -> None:
    """Notes that what is done is saved; ends the process if it was asked to end."""
    with self._condition:
      self._position = AT_ONCE
      is_asked = self._asked_at is not None
    if is_asked:
      self.end_at_once()

  def is_due(self, iteration: int) -> bool:
    """Returns whether the process must save and end after an iteration that is done.

    All processes of a run get the same answer, if each of them asks after every iteration. The
    process waits for the others only if one was asked to end.
    """
    with self._condition:
      if self._asked_at is not None:
        self._condition.wait_for(lambda: self._decision is not None)
      if self._decision == iteration:
        return True
      self._position = iteration + 1
      return False

  def saved(self, where: str) -> SystemExit:
    """Returns the exception that ends the process, after a message.

    Args:
      where: What has been saved.
    """
    with self._condition:
      self._position = AT_ONCE  # for the message of a further signal
    _print(
      f"asked to end by {self._asked_by}: saved {where}; {self._how_to_go_on}"
    )
    return SystemExit(EXIT_CODE)

  # What other threads call.

  def ask(self, asked_by: str) -> None:
    """Asks this process to end; the first one to ask counts.

    Args:
      asked_by: Name of the signal, or which other process was asked.
    """
    with self._condition:
      if self._asked_at is not None:
        return
      self._asked_by = asked_by
      self._asked_at = self._clock()
      position = self._position
      self._condition.notify_all()
    if position != AT_ONCE:
      _print(
        f"asked to end by {asked_by}: finishes iteration {position} and saves, within "
        f"{self.grace_seconds:g} s; a second signal ends it at once"
      )
    if not self._is_together:
      self.decide([position])

  def wait_until_asked(self, seconds: float) -> str:
    """Returns who asked this process to end, after so many seconds at most; "" for nobody."""
    with self._condition:
      self._condition.wait_for(lambda: self._asked_at is not None, seconds)
      return self._asked_by

  def join_others(self) -> None:
    """Leaves the decision, and the end of this process, to `agreement` with the others."""
    with self._condition:
      self._is_together = True

  def position(self) -> int:
    """Returns the position; after `ask`, `is_due` keeps it until `decide`."""
    with self._condition:
      return self._position

  def decide(self, positions: Collection[int]) -> None:
    """Decides when to end, by the positions of all processes.

    One that has nothing to save will come to no further iteration, and no other can end one without
    it. Else nobody has passed the end of the iteration of the furthest, and all can get there.
    """
    if AT_ONCE in positions:
      self.end_at_once()
      return
    with self._condition:
      if self._decision is None:
        self._decision = max(positions)
      self._condition.notify_all()

  def end_at_once(self) -> None:
    """Makes another thread end this process, as soon as the other processes know of it."""
    with self._condition:
      if self._at_once_since is None:
        self._at_once_since = self._clock()
      self._decision = AT_ONCE
      self._condition.notify_all()
    if self._pipe is not None:
      os.write(self._pipe, _WAKE)

  def ends_at_once(self) -> bool:
    """Returns whether the process ends without waiting for its iteration."""
    with self._condition:
      return self._decision == AT_ONCE

  def exit(self) -> None:
    """Ends the process now."""
    with self._condition:
      position = self._position
    reason = f"asked to end by {self._asked_by}"
    if position == AT_ONCE:
      _print(f"{reason}: nothing has to be saved; {self._how_to_go_on}")
    else:
      _print(
        f"{reason}: iteration {position} is not saved; {self._how_to_go_on} from the last "
        "checkpoint"
      )
    self._exit_process(EXIT_CODE)

  # The thread that reads the signals.

  def _watch(self, reader: int) -> None:
    """Reads signals, and ends the process in time."""
    while True:
      readable, _, _ = select.select([reader], [], [], self._seconds_to_wait())
      if readable:
        for number in os.read(reader, 64):
          if number in self._numbers:
            self.signal(number)
      self.act()

  def signal(self, number: int) -> None:
    """Handles a signal."""
    with self._condition:
      asked_at = self._asked_at
      ends_at_once = self._decision == AT_ONCE
    if asked_at is None:
      self.ask(signal.Signals(number).name)
    elif self._clock() - asked_at < _ANOTHER_SIGNAL_SECONDS:
      return
    elif ends_at_once:
      self.exit()
    else:
      self.end_at_once()

  def act(self) -> None:
    """Ends the process if it is time."""
    with self._condition:
      is_together = self._is_together
      ends_at_once = self._decision == AT_ONCE
    if ends_at_once and not is_together:
      self.exit()
    seconds = self._seconds_to_wait()
    if seconds is None or seconds > 0:
      return
    if ends_at_once:
      self.exit()  # the farewell took too long
    self.end_at_once()

  def _seconds_to_wait(self) -> float | None:
    """Returns the seconds until `act` must look again; None if nobody has asked."""
    with self._condition:
      if self._asked_at is None:
        return None
      end = self._asked_at + self.grace_seconds
      if self._at_once_since is not None:
        end = self._at_once_since + FAREWELL_SECONDS
    return max(0.0, end - self._clock())


# Signals are sent to processes, so there is one for all code of this process.
ENDING = Ending()


def _leave_to_thread(*unused) -> None:
  """Handles a signal in the main thread: the thread that reads the pipe has it already."""


def _print(text: str) -> None:
  """Writes a line to stderr without the locks of Python's files."""
  try:
    os.write(2, f"r3jax: {text}\n".encode())
  except OSError:
    return  # nobody reads it

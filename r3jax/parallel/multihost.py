"""The processes of a run: how they connect, exchange arrays and fail together."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import itertools
import os
import threading
import time
from typing import Any, NoReturn

from absl import logging
import jax

# The coordination service's client has no public name.
from jax._src import distributed
from jax.experimental import multihost_utils
import numpy as np

from r3jax.parallel import endings
from r3jax.parallel import preemption

# How long processes wait for each other at a common point; one may be slow to load weights.
WAIT_SECONDS = 1800
# How long a process may be silent until JAX ends the others. Its last heartbeat may be old when it
# is killed: with 100 s JAX was seen to wait 79.
HEARTBEAT_SECONDS = 200
_POLL_SECONDS = 1.0  # between two looks at whether another process has failed
# How long a process that fails waits for answers of the others, which look every _POLL_SECONDS.
_ANSWER_SECONDS = 6.0
# Between two signs of life of a process, and how long one may give none until process 0 ends the
# others: before JAX aborts them. Both are threads, which run while a computation waits.
_BEAT_SECONDS = 10.0
_SILENT_SECONDS = 60.0
# What JAX raises where a computation fails; a broken connection of a collective is a ValueError.
_OF_COMPUTATIONS = (jax.errors.JaxRuntimeError, ValueError)
_THIS_HOST = ("local", "localhost", "127.0.0.1")
# Folders of the coordination service, with an entry per process. The text of a failed process is
# its problem, or "" while it asks whether the others live.
_FAILED = "r3jax/failed/"
_ANSWERED = "r3jax/answered/"
_ALIVE = "r3jax/alive/"
_HAS_LEFT = "has left the block"
_ROUND = "r3jax/round/"
_rounds = itertools.count()
# Held by the thread that ends this process, and never released.
_end = threading.Lock()


class PlainError(Exception):
  """An error whose message is all that a person needs: no traceback is logged."""


class OthersFailed(PlainError, RuntimeError):
  """Other processes failed, or did not come to a common point; their logs show why."""


def initialize(coordinator: str, num_processes: int, process_id: int):
  """Connects the processes of a run; to be called before JAX touches a device.

  On Cloud TPU, GKE, SLURM and other clusters that JAX detects it finds the others by itself. Where
  it detects no cluster the process is alone, which is no error.

  Args:
    coordinator: "host:port" of process 0, for other machines; empty to let JAX detect it.
    num_processes: how many processes there are; read only with a coordinator.
    process_id: number of this process; read only with a coordinator.
  """
  # For processes on CPUs.
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  # Its handler of SIGTERM would take the place of ours, see `preemption`.
  jax.config.update("jax_enable_preemption_service", False)
  if coordinator:
    jax.distributed.initialize(
      coordinator,
      num_processes,
      process_id,
      heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )
    return
  if _is_only_host():
    # JAX would wait for a coordinator at a name that only this host can reach.
    logging.debug("the TPU has one host: one process")
    return
  try:
    jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
  except ValueError as error:
    if "coordinator_address" not in str(error):
      raise
    logging.debug("no cluster was found: one process")


def _is_only_host() -> bool:
  """Returns whether the TPU's environment has this host alone, by a name that only it can reach."""
  worker_hosts = os.environ.get("TPU_WORKER_HOSTNAMES")
  hosts = os.environ.get("TPU_PROCESS_ADDRESSES", worker_hosts)
  is_in_slice_group = "MEGASCALE_COORDINATOR_ADDRESS" in os.environ
  return hosts in _THIS_HOST and not is_in_slice_group


def fetch(tree: Any) -> Any:
  """Returns the whole arrays of a computation, as numpy, on every process.

  Every process must call it at the same point, because it gathers the parts that other processes
  hold. Arrays that were never on a device stay this process's own.
  """
  if jax.process_count() == 1:
    return jax.device_get(tree)
  return jax.tree.map(_whole, tree)


def _whole(x: jax.Array | np.ndarray | np.generic) -> np.ndarray:
  """Returns a whole array, gathered from all processes where it is split."""
  if not isinstance(x, jax.Array):
    return np.asarray(x)
  if x.is_fully_replicated:
    return np.asarray(x.addressable_data(0))
  return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def _client() -> Any:
  """Returns the client of the coordination service, which connected processes share."""
  client = distributed.global_state.client
  if client is None:
    raise RuntimeError("processes must be connected first, see initialize")
  return client


def write_text(folder: str, text: str = "") -> None:
  """Writes this process's text into a folder of the coordination service."""
  key = f"{folder}{jax.process_index()}"
  _client().key_value_set(key, text, allow_overwrite=True)


def write_first(key: str, text: str) -> str:
  """Writes a text if no process has written one; returns the text that was written first."""
  client = _client()
  try:
    client.key_value_set(key, text)
  except jax.errors.JaxRuntimeError as error:
    if "ALREADY_EXISTS" not in str(error):
      raise
  return client.key_value_try_get(key)


def read_texts(folder: str) -> dict[int, str]:
  """Returns the texts in a folder of the coordination service, by process."""
  entries = _client().key_value_dir_get(folder)
  return {int(key.rpartition("/")[2]): text for key, text in sorted(entries)}


def raise_together(error: Exception | None):
  """Raises on every process if one of them has an error, so that none waits for the others.

  Every process must call it at the same point. A process that is alone raises its error, if any.

  Args:
    error: this process's own, if it has one.

  Raises:
    Exception: this process's own error.
    OthersFailed: another process has an error, which its log shows; or a process did not reach this
      point within WAIT_SECONDS.
  """
  if jax.process_count() == 1:
    if error is not None:
      raise error
    return
  client = _client()
  folder = f"{_ROUND}{next(_rounds)}/"
  if error is not None:
    text = f"{type(error).__name__}: {error}"
    client.key_value_set(f"{folder}{jax.process_index()}", text)
  try:
    _wait_for_others(folder)
  except (OthersFailed, jax.errors.JaxRuntimeError):
    if error is None:
      raise
  if error is not None:
    raise error
  failures = read_texts(folder)
  if failures:
    lines = [
      f"\n  process {process}: {text}" for process, text in failures.items()
    ]
    raise OthersFailed(
      f"every process must be able to go on; processes {list(failures)} failed, see their logs"
      + "".join(lines)
    )


def _wait_for_others(folder: str):
  """Waits until every process waits at this point of the run.

  Raises:
    OthersFailed: one did not come within WAIT_SECONDS.
  """
  try:
    _client().wait_at_barrier(folder, WAIT_SECONDS * 1000)
  except jax.errors.JaxRuntimeError as error:
    if "DEADLINE_EXCEEDED" not in str(error):
      raise
    raise OthersFailed(
      f"every process must come here within {WAIT_SECONDS} s of the first; see the logs of those"
      f" that did not:\n{error}"
    ) from error


def exchange(text: str, occasion: str = "") -> list[str]:
  """Returns the text of every process, by its number, on every process.

  Every process must call it at the same point. It compiles nothing, unlike collectives of arrays.

  Args:
    text: This process's own.
    occasion: Names the call where it is made beside the main thread, whose other calls come in no
      fixed order with it; it must never repeat.

  Raises:
    OthersFailed: A process did not reach this point within WAIT_SECONDS.
  """
  if jax.process_count() == 1:
    return [text]
  folder = f"{_ROUND}{occasion or next(_rounds)}/"
  _client().key_value_set(f"{folder}{jax.process_index()}", text)
  _wait_for_others(folder)
  texts = read_texts(folder)
  return [texts[process] for process in range(jax.process_count())]


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
  """Ends every process when an exception leaves the block on one of them, and logs whose it was.

  The others are mostly inside of a computation that waits for the one that failed, where no
  exception reaches them. A thread therefore polls for failures and ends the process at once,
  without the clean-up for which JAX would wait for the others. Where a process is killed or hangs,
  process 0 misses its signs of life after _SILENT_SECONDS. Where process 0 is killed, JAX aborts
  the others by SIGABRT, because its coordination service is gone. `SystemExit` leaves the block as
  usual; all processes must raise it then, see `raise_together`. With one process the block just
  runs.
  """
  if jax.process_count() == 1:
    yield
    return
  block_has_ended = threading.Event()
  watcher = threading.Thread(
    target=_watch, args=(block_has_ended,), daemon=True
  )
  watcher.start()
  try:
    yield
  except Exception as error:
    # Any exception: whatever it is, the others must not wait for this process.
    if preemption.ENDING.ends_at_once():
      # The others have left a computation, and another thread ends this process.
      time.sleep(preemption.FAREWELL_SECONDS)
    _claim_end()
    _end_after(error)
  finally:
    block_has_ended.set()
    watcher.join()
  # Other blocks may take longer than this process's silence is borne.
  write_text(_ALIVE, _HAS_LEFT)


def _claim_end():
  """Leaves the end of this process to this thread; does not return if another one ends it."""
  if not _end.acquire(blocking=False):
    threading.Event().wait()


def _end_after(error: Exception) -> NoReturn:
  """Ends this process after an exception, and logs why: its own, or that of another process."""
  if isinstance(error, PlainError):
    logging.error("r3jax: %s", error)
    _end_claimed(str(error))
  if isinstance(error, _OF_COMPUTATIONS):
    silent = _silent_behind(error)
    if silent is not None:
      _end_claimed(None, silent)
  logging.error("this process failed, the others are ended", exc_info=error)
  _end_claimed(f"{type(error).__name__}: {error}")


def _silent_behind(error: Exception) -> Sequence[int] | None:
  """Logs which processes made a computation fail.

  Returns:
    Those of them that do not answer; None if the computation failed by itself.
  """
  try:
    # Those that live answer.
    write_text(_FAILED)
    silent = _wait_for_answers()
    failures = read_texts(_FAILED)
  except jax.errors.JaxRuntimeError:
    _log_silent([0])
    return [0]
  if _log_failures(failures):
    return silent
  if silent:
    logging.info("a computation failed: %s", str(error).partition("\n")[0])
    # For the others, which may not compute.
    write_text(_FAILED, _silence(silent))
    _log_silent(silent)
    return silent
  return None


def _silence(processes: Sequence[int]) -> str:
  return f"processes {list(processes)} do not answer: they were killed or hang"


def _log_silent(processes: Sequence[int]) -> None:
  """Logs which processes do not answer, if there are any."""
  if processes:
    logging.error("%s; their logs may say more", _silence(processes))


def _log_failures(failures: Mapping[int, str]) -> bool:
  """Logs which other processes have a problem; returns whether there are any."""
  others = {
    process: text
    for process, text in failures.items()
    if text and process != jax.process_index()
  }
  for process, text in others.items():
    first_line = text.partition("\n")[0]
    logging.error(
      "process %d failed, and ends this one: %s", process, first_line
    )
  return bool(others)


def _wait_for_answers(known_silent: Sequence[int] = ()) -> list[int]:
  """Returns the processes that do not answer within _ANSWER_SECONDS.

  Args:
    known_silent: processes that are not waited for.
  """
  write_text(_ANSWERED)
  end = time.monotonic() + _ANSWER_SECONDS
  waited_for = set(range(jax.process_count())) - set(known_silent)
  while True:
    answered = set(read_texts(_ANSWERED))
    silent = sorted(waited_for - answered)
    if not silent or time.monotonic() > end:
      return silent
    time.sleep(_POLL_SECONDS)


class _Beats:
  """Signs of life of all processes: each gives one now and then, and process 0 reads them."""

  def __init__(self, clock: Callable[[], float] = time.monotonic):
    """Starts now, for every process."""
    self._clock = clock
    self._next = clock()
    self._number = 0
    # Process -> its last sign of life and when it was new here. One that has given none yet may
    # still load weights: it is connected, and JAX watches it.
    self._last: dict[int, tuple[str, float]] = {}

  def exchange(self) -> list[int]:
    """Gives a sign of life if one is due; returns the processes that have stopped, on process 0."""
    now = self._clock()
    if now < self._next:
      return []
    self._next = now + _BEAT_SECONDS
    self._number += 1
    write_text(_ALIVE, str(self._number))
    if jax.process_index():
      return []
    for process, beat in read_texts(_ALIVE).items():
      if process not in self._last or self._last[process][0] != beat:
        self._last[process] = (beat, now)
    return [
      process
      for process, (beat, since) in sorted(self._last.items())
      if beat != _HAS_LEFT and now - since > _SILENT_SECONDS
    ]


def _watch(block_has_ended: threading.Event):
  """Ends this process when another one has failed, until the block has ended."""
  beats = _Beats()
  while not block_has_ended.wait(_POLL_SECONDS):
    try:
      failures = read_texts(_FAILED)
      if failures:
        write_text(_ANSWERED)
      stopped = beats.exchange()
    except jax.errors.JaxRuntimeError:
      # JAX aborts a process whose coordinator is gone, if it is faster.
      _claim_end()
      _log_silent([0])
      endings.end_now(1)
    if any(failures.values()):
      _claim_end()
      _log_failures(failures)
      _end_claimed(None)
    if stopped:
      _claim_end()
      _log_silent(stopped)
      _end_claimed(_silence(stopped), stopped)


def end_process(problem: str | None):
  """Ends this process after some seconds, in which every other one learns the problem and answers.

  A process that is alone ends at once.

  Args:
    problem: this process's own, if it has one.
  """
  _claim_end()
  _end_claimed(problem)


def _end_claimed(
  problem: str | None, known_silent: Sequence[int] = ()
) -> NoReturn:
  """Ends this process as `end_process` does, in the thread that may.

  Args:
    problem: this process's own, if it has one.
    known_silent: processes that do not answer. Waiting for them would take so long that JAX, which
      misses them some seconds later than this module, aborts this process first.
  """
  if jax.process_count() == 1:
    endings.end_now(1)
  try:
    if problem:
      write_text(_FAILED, problem)
    # Until the others have looked.
    time.sleep(3 * _POLL_SECONDS)
    silent = _wait_for_answers(known_silent)
    if problem:
      _log_silent(silent)
    if jax.process_index() == 0:
      # It runs the coordination service, through which the others speak.
      time.sleep(3 * _POLL_SECONDS)
  except jax.errors.JaxRuntimeError:
    _log_silent([0])
  endings.end_now(1)

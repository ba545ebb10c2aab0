"""The processes of a run: how they connect, exchange arrays and fail together."""

from collections.abc import Iterator
import contextlib
import itertools
import os
import threading
import time
from typing import Any

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
# How long a process may be silent until JAX ends the others.
HEARTBEAT_SECONDS = 100
_POLL_SECONDS = 1.0  # between two looks at whether another process has failed
_THIS_HOST = ("local", "localhost", "127.0.0.1")
# Folders of the coordination service, with an entry per process.
_FAILED = "r3jax/failed/"
_ANSWERED = "r3jax/answered/"
_ROUND = "r3jax/round/"
_rounds = itertools.count()


class PlainError(Exception):
  """An error whose message is all that a person needs: no traceback is logged."""


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
    RuntimeError: another process has an error, which its log shows; or a process did not reach this
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
    client.wait_at_barrier(folder, WAIT_SECONDS * 1000)
  except jax.errors.JaxRuntimeError as late:
    if error is None:
      raise RuntimeError(
        f"every process must come here within {WAIT_SECONDS} s of the first; see the logs of those"
        f" that did not:\n{late}"
      ) from late
  if error is not None:
    raise error
  failures = read_texts(folder)
  if failures:
    lines = [
      f"\n  process {process}: {text}" for process, text in failures.items()
    ]
    raise RuntimeError(
      f"every process must be able to go on; processes {list(failures)} failed, see their logs"
      + "".join(lines)
    )


def exchange(text: str, occasion: str = "") -> list[str]:
  """Returns the text of every process, by its number, on every process.

  Every process must call it at the same point. It compiles nothing, unlike collectives of arrays.

  Args:
    text: This process's own.
    occasion: Names the call where it is made beside the main thread, whose other calls come in no
      fixed order with it; it must never repeat.

  Raises:
    RuntimeError: A process did not reach this point within WAIT_SECONDS.
  """
  if jax.process_count() == 1:
    return [text]
  client = _client()
  folder = f"{_ROUND}{occasion or next(_rounds)}/"
  client.key_value_set(f"{folder}{jax.process_index()}", text)
  try:
    client.wait_at_barrier(folder, WAIT_SECONDS * 1000)
  except jax.errors.JaxRuntimeError as late:
    raise RuntimeError(
      f"every process must come here within {WAIT_SECONDS} s of the first; see the logs of those"
      f" that did not:\n{late}"
    ) from late
  texts = read_texts(folder)
  return [texts[process] for process in range(jax.process_count())]


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
  """Ends every process when an exception leaves the block on one of them, and logs whose it was.

  The others are mostly inside of a computation that waits for the one that failed, where no
  exception reaches them. A thread therefore polls for failures and ends the process at once,
  without the clean-up for which JAX would wait for the others. `SystemExit` leaves the block as
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
    block_has_ended.set()
    if preemption.ENDING.ends_at_once():
      # The others have left a computation, and another thread ends this process.
      time.sleep(preemption.FAREWELL_SECONDS)
    if isinstance(error, PlainError):
      logging.error("r3jax: %s", error)
    else:
      logging.exception("this process failed, the others are ended")
    end_process(f"{type(error).__name__}: {error}")
  finally:
    block_has_ended.set()
    watcher.join()


def _watch(block_has_ended: threading.Event):
  """Ends this process when another one has failed, until the block has ended."""
  while not block_has_ended.wait(_POLL_SECONDS):
    try:
      failures = read_texts(_FAILED)
    except jax.errors.JaxRuntimeError as error:
      # JAX ends a process whose coordinator is gone.
      logging.error("process 0 does not answer: %s", error)
      return
    for process, text in failures.items():
      first_line = text.partition("\n")[0]
      logging.error(
        "process %d failed, and ends this one: %s", process, first_line
      )
    if failures:
      end_process(None)


def end_process(problem: str | None):
  """Ends this process after some seconds, in which every other one learns the problem and answers.

  A process that is alone ends at once.

  Args:
    problem: this process's own, if it has one.
  """
  if jax.process_count() == 1:
    endings.end_now(1)
  process = jax.process_index()
  try:
    write_text(_ANSWERED)
    if problem:
      write_text(_FAILED, problem)
    time.sleep(3 * _POLL_SECONDS)
    answered = set(read_texts(_ANSWERED))
    silent = sorted(set(range(jax.process_count())) - answered)
    if silent:
      logging.error(
        "processes %s do not answer: they were killed or hang", silent
      )
    if process == 0:
      # It runs the coordination service, through which the others speak.
      time.sleep(3 * _POLL_SECONDS)
  except jax.errors.JaxRuntimeError as error:
    logging.error(
      "process 0 does not answer: it was killed or hangs: %s", error
    )
  endings.end_now(1)

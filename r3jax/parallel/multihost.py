"""The processes of a run: how they find and how they understand each other."""

from collections.abc import Iterator
import contextlib
import itertools
import os
import threading
import time

from absl import logging
import jax

# the coordination service's client has no public name
from jax._src import distributed
from jax.experimental import multihost_utils
import numpy as np

# that processes wait for each other where they agree; one may be slow to load weights
WAIT_SECONDS = 1800
# without a sign of life of a process until JAX ends the others
HEARTBEAT_SECONDS = 100
_POLL_SECONDS = 1.0  # between two looks at whether another process has failed
_THIS_HOST = ("local", "localhost", "127.0.0.1")
_FAILED, _ANSWERED, _ROUND = "r3jax/failed/", "r3jax/answered/", "r3jax/round/"
_rounds = itertools.count()


def _is_only_host() -> bool:
  """Whether the TPU's environment names this host alone, by a name that no other could reach."""
  hosts = os.environ.get(
    "TPU_PROCESS_ADDRESSES", os.environ.get("TPU_WORKER_HOSTNAMES")
  )
  return (
    hosts in _THIS_HOST and "MEGASCALE_COORDINATOR_ADDRESS" not in os.environ
  )


def initialize(coordinator: str, num_processes: int, process_id: int):
  """Connects the processes of a run; to be called before JAX touches a device.

  On Cloud TPU, GKE, SLURM and other clusters that JAX knows it finds the others by itself. Where it
  finds no cluster the process is alone, which is no error.

  Args:
    coordinator: "host:port" of process 0, for other machines; empty if JAX is to find out.
    num_processes, process_id: with a coordinator, how many processes there are and which this is.
  """
  # for processes on CPUs
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  if coordinator:
    jax.distributed.initialize(
      coordinator,
      num_processes,
      process_id,
      heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )
    return
  if _is_only_host():  # JAX would wait for a coordinator of that name
    logging.debug("the TPU has one host: one process")
    return
  try:
    jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
  except ValueError as error:
    if "coordinator_address" not in str(error):
      raise
    logging.debug("no cluster was found: one process")


def fetch(tree):
  """Returns arrays of a computation whole, as numpy, on every process.

  Every process must call it at the same point: what another one holds is sent. Numbers that never
  were on a device stay this process's own.
  """
  if jax.process_count() == 1:
    return jax.device_get(tree)
  return jax.tree.map(_whole, tree)


def _whole(x: jax.Array | np.ndarray | np.generic) -> np.ndarray:
  if not isinstance(x, jax.Array):
    return np.asarray(x)
  if x.is_fully_replicated:
    return np.asarray(x.addressable_data(0))
  return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def _texts(folder: str) -> dict[int, str]:
  """Returns what processes have written into a folder of the coordination service, by process."""
  entries = distributed.global_state.client.key_value_dir_get(folder)
  return {int(key.rpartition("/")[2]): text for key, text in sorted(entries)}


def raise_together(error: Exception | None):
  """Raises on every process if one of them has an error, so that none waits for the others.

  Every process must call it at the same point. With one process it raises the error or does nothing.

  Raises:
    Exception: this process's own error.
    RuntimeError: another process has one; its log says more. Or one did not come within WAIT_SECONDS.
  """
  if jax.process_count() == 1:
    if error is not None:
      raise error
    return
  client, folder = distributed.global_state.client, f"{_ROUND}{next(_rounds)}/"
  if error is not None:
    client.key_value_set(
      f"{folder}{jax.process_index()}", f"{type(error).__name__}: {error}"
    )
  try:
    client.wait_at_barrier(folder, WAIT_SECONDS * 1000)
  except jax.errors.JaxRuntimeError as late:
    if error is None:
      raise RuntimeError(
        f"every process must come here within {WAIT_SECONDS} s of the first; see the logs of those that did not:\n{late}"
      ) from late
  if error is not None:
    raise error
  if failed := _texts(folder):
    texts = "".join(
      f"\n  process {process}: {text}" for process, text in failed.items()
    )
    raise RuntimeError(
      f"every process must be able to go on; processes {list(failed)} failed, see their logs{texts}"
    )


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
  """Ends every process when an exception leaves the block on one of them, and says whose it was.

  The others are mostly inside of a computation that waits for the one that failed, where no
  exception reaches them: a thread looks out for it, and ends the process at once, without the
  clean-up for which JAX would wait for the others. `SystemExit` leaves the block as usual; all
  processes must raise it then, see `raise_together`. With one process the block is just run.
  """
  if jax.process_count() == 1:
    yield
    return
  over = threading.Event()
  watcher = threading.Thread(target=_watch, args=(over,), daemon=True)
  watcher.start()
  try:
    yield
  except Exception as error:
    # whatever it is, the others must not wait for this process
    over.set()
    logging.exception("this process failed, the others are ended")
    _end(f"{type(error).__name__}: {error}")
  finally:
    over.set()
    watcher.join()


def _watch(over: threading.Event):
  while not over.wait(_POLL_SECONDS):
    try:
      failed = _texts(_FAILED)
    except jax.errors.JaxRuntimeError as error:
      # JAX ends a process whose coordinator is gone
      logging.error("process 0 does not answer: %s", error)
      return
    for process, text in failed.items():
      logging.error(
        "process %d failed, and ends this one: %s",
        process,
        text.partition("\n")[0],
      )
    if failed:
      _end(None)


def _end(problem: str | None):
  """Ends this process, in a moment: until then every other one that lives learns why, and answers.

  Args:
    problem: this process's own, if it has one.
  """
  client, process = distributed.global_state.client, jax.process_index()
  try:
    client.key_value_set(f"{_ANSWERED}{process}", "", allow_overwrite=True)
    if problem:
      client.key_value_set(f"{_FAILED}{process}", problem, allow_overwrite=True)
    time.sleep(3 * _POLL_SECONDS)
    if silent := sorted(
      set(range(jax.process_count())) - set(_texts(_ANSWERED))
    ):
      logging.error(
        "processes %s do not answer: they were killed or hang", silent
      )
    if process == 0:  # the others speak through it
      time.sleep(3 * _POLL_SECONDS)
  except jax.errors.JaxRuntimeError as error:
    logging.error(
      "process 0 does not answer: it was killed or hangs: %s", error
    )
  logging.flush()
  os._exit(1)

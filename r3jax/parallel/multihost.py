"""The processes of a run: how they find and how they understand each other."""

from absl import logging
import jax
from jax.experimental import multihost_utils
import numpy as np


def initialize(coordinator: str, num_processes: int, process_id: int):
  """Connects the processes of a run; to be called before JAX touches a device.

  On Cloud TPU, GKE, SLURM and other clusters that JAX knows it finds the others by itself. Where it
  finds no cluster the process is alone, which is no error.

  Args:
    coordinator: "host:port" of process 0, for other machines; empty if JAX is to find out.
    num_processes, process_id: with a coordinator, how many processes there are and which this is.
  """
  jax.config.update("jax_cpu_collectives_implementation", "gloo")  # for processes on CPUs
  if coordinator:
    jax.distributed.initialize(coordinator, num_processes, process_id)
    return
  try:
    jax.distributed.initialize()
  except ValueError as error:
    if "coordinator_address" not in str(error):
      raise
    logging.debug("no cluster was found: one process")


def fetch(tree):
  """Returns arrays of a computation whole, as numpy, on every process.

  Every process must call it at the same point: what another one holds is sent.
  """
  if jax.process_count() == 1:
    return jax.device_get(tree)
  return jax.tree.map(_whole, tree)


def _whole(x: jax.Array) -> np.ndarray:
  if x.is_fully_replicated:
    return np.asarray(x.addressable_data(0))
  return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def raise_together(error: Exception | None):
  """Raises on every process if one of them has an error, so that none waits for the others.

  Every process must call it at the same point. With one process it raises the error or does nothing.

  Raises:
    Exception: this process's own error.
    RuntimeError: another process has one; its log says what.
  """
  if error is not None and jax.process_count() == 1:
    raise error
  if jax.process_count() == 1:
    return
  flags = np.asarray(multihost_utils.process_allgather(np.array([error is not None])))
  if error is not None:
    raise error
  if flags.any():
    broken = np.flatnonzero(flags.reshape(jax.process_count(), -1).any(axis=1)).tolist()
    raise RuntimeError(f"every process must be able to go on; processes {broken} failed, see their logs")

"""Agreement of the processes of a run."""

import jax
from jax.experimental import multihost_utils
import numpy as np


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

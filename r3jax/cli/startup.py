"""What the commands that run on many devices have in common: flags, logs, compiled programs, processes."""

from collections.abc import Callable
import os
import sys

from absl import flags
from absl import logging
from etils import epath
import jax
import ml_collections

import r3jax
from r3jax.parallel import meshes
from r3jax.parallel import multihost

_COORDINATOR = flags.DEFINE_string(
  "coordinator",
  "",
  "host:port of process 0, for several processes outside of Cloud TPU, GKE and SLURM.",
)
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes", 1, "With --coordinator: how many there are.", 1
)
_PROCESS_ID = flags.DEFINE_integer(
  "process_id", 0, "With --coordinator: which this is.", 0
)


def keep_programs(mesh: ml_collections.ConfigDict) -> epath.Path | None:
  """Lets JAX keep compiled programs between starts; returns a folder beside them for traced ones.

  The user may say where (JAX_COMPILATION_CACHE_DIR), or that nothing is kept (empty). Nothing is kept
  of meshes that CPUs shard parameters over: XLA of JAX 0.10 runs the collectives of a program from the
  cache in no fixed order there, so that devices wait for each other for ever.

  Args:
    mesh: of the run; the processes have been started, see `start`.
  """
  if jax.default_backend() == "cpu" and mesh.fsdp * mesh.tensor > 1:
    jax.config.update("jax_compilation_cache_dir", None)
    return None
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    folder = os.path.expanduser("~/.cache/r3jax/compiled")
    jax.config.update("jax_compilation_cache_dir", folder)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
  folder = jax.config.jax_compilation_cache_dir
  return epath.Path(folder) / "traced" if folder else None


def log_ours() -> None:
  """Keeps the log to this program's own lines, and what others warn about."""
  ours = os.path.dirname(r3jax.__file__)
  is_ours = lambda record: (
    record.levelno >= logging.converter.STANDARD_WARNING
    or record.pathname.startswith(ours)
  )
  logging.set_verbosity(logging.INFO)
  logging.get_absl_handler().addFilter(is_ours)


def start(mesh: ml_collections.ConfigDict, rows: int) -> None:
  """Finds the other processes; to be called before JAX touches a device.

  On one host's CPUs every core becomes a device, as far as `rows` split evenly, unless the mesh is set.
  """
  if not _COORDINATOR.value and mesh.to_dict() == {
    "data": -1,
    "fsdp": 1,
    "tensor": 1,
  }:
    meshes.use_all_cores(rows)
  multihost.initialize(
    _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
  )


def together(function: Callable, *arguments):
  """Calls a function that no process waits for others in; ends all, with a message, where one raises ValueError."""
  found = problem = None
  try:
    found = function(*arguments)
  except ValueError as error:
    logging.debug("traceback", exc_info=True)
    problem = error
  try:
    multihost.raise_together(problem)
  except (ValueError, RuntimeError) as error:
    sys.exit(f"r3jax: {error}")
  return found

"""The main job: R3 on whatever devices JAX finds, on one host or on all hosts of a slice.

  python launch/tpu.py --config=configs/r3_geneval.py:shapes --workdir=DIR [--config.KEY=VALUE ...]

Every host runs the same command, with a workdir that all of them see; see docs/tpu.md.
"""

import math
import os
import sys

from absl import app
from absl import flags
from absl import logging
from etils import epath
import jax
from ml_collections import config_flags

import r3jax
from r3jax import train
from r3jax.parallel import mesh as mesh_lib
from r3jax.parallel import multihost
from r3jax.rewards import budget

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # config files import each other

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, with its variant.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; an interrupted run there is resumed.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "host:port of process 0, for several processes outside of Cloud TPU, GKE and SLURM.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", 1, "With --coordinator: how many there are.", 1)
_PROCESS_ID = flags.DEFINE_integer("process_id", 0, "With --coordinator: which this is.", 0)


def _keep_programs() -> epath.Path | None:
  """Lets JAX keep compiled programs between starts; returns a folder beside them for traced ones.

  The user may say where (JAX_COMPILATION_CACHE_DIR), or that nothing is kept (empty).
  """
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    folder = os.path.expanduser("~/.cache/r3jax/compiled")
    jax.config.update("jax_compilation_cache_dir", folder)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
  folder = jax.config.jax_compilation_cache_dir
  return epath.Path(folder) / "traced" if folder else None


def _is_ours(record) -> bool:
  """Keeps the log to this program's own lines, and what others warn about."""
  ours = os.path.dirname(r3jax.__file__)
  return record.levelno >= logging.converter.STANDARD_WARNING or record.pathname.startswith(ours)


def _prepare(config):
  """Returns session and starting policy; ends all processes where one cannot start."""
  prepared = problem = None
  try:
    prepared = train.prepare(config, _WORKDIR.value)
  except ValueError as error:
    logging.debug("traceback", exc_info=True)
    problem = error
  try:
    multihost.raise_together(problem)
  except (ValueError, RuntimeError) as error:
    sys.exit(f"r3jax: {error}")
  return prepared


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  logging.set_verbosity(logging.INFO)
  logging.get_absl_handler().addFilter(_is_ours)
  programs = _keep_programs()
  config = _CONFIG.value
  if not _COORDINATOR.value and config.mesh.to_dict() == {"data": -1, "fsdp": 1, "tensor": 1}:
    mesh_lib.use_all_cores(math.gcd(config.groups_per_step, config.eval.batch_size))
  multihost.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
  with multihost.ending_together():
    session, policy = _prepare(config)
    try:
      train.run(session, policy, programs)
    except budget.BudgetExceeded as error:
      sys.exit(f"r3jax: {error}")


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(main)

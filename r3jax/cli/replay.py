"""Repeats an iteration whose update was skipped, and finds the first number that is not finite.

  r3jax replay DIR

DIR is WORKDIR/skipped/step_NNNNNN. The workdir is only read; the last checkpoint before that
iteration should still be there, otherwise all iterations are repeated.
"""

import sys

import jax

from r3jax.cli import startup
from r3jax.files import paths
from r3jax.run import replay


def define_flags() -> None:
  """Defines the flags of the command."""
  startup.define_flags()


def run(folder: str) -> None:
  """Prints what is not finite, or exits with a message where the folder cannot be used."""
  startup.log_ours()
  try:
    replay.check_exists(folder)
    config = replay.config_of_run(paths.of_user(folder).parent.parent)
  except ValueError as error:
    sys.exit(f"r3jax: {error}")
  startup.start(config.mesh, config.groups_per_step, config.step.quick_compile)
  startup.keep_programs(config.mesh)
  with startup.ending_together():
    lines = startup.together(replay.run, folder)
    if not jax.process_index():
      print("\n".join(lines))

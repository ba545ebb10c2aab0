"""The main job: R3 on whatever devices JAX finds, on one host or on all hosts of a slice.

  python launch/tpu.py --config=configs/r3_geneval.py:shapes --workdir=DIR [--config.KEY=VALUE ...]

Every host runs the same command, with a workdir that all of them see; see docs/tpu.md.
"""

import math
import os
import sys

from absl import app
from absl import flags
from ml_collections import config_flags

from r3jax.cli import startup
from r3jax.parallel import multihost
from r3jax.rewards.from_host import budget
from r3jax.run import loop

# config files import each other
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Config file, with its variant.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run; an interrupted run there is resumed."
)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  startup.log_ours()
  config = _CONFIG.value
  startup.start(
    config.mesh, math.gcd(config.groups_per_step, config.eval.batch_size)
  )
  programs = startup.keep_programs(config.mesh)
  with multihost.ending_together():
    session, policy = startup.together(loop.prepare, config, _WORKDIR.value)
    try:
      loop.run(session, policy, programs)
    except budget.BudgetExceeded as error:
      sys.exit(f"r3jax: {error}")


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(main)

"""Trains a model by R3 on all devices that JAX finds, on one host or on all hosts of a slice.

  r3jax train --config=r3_geneval:shapes --workdir=DIR [--config.KEY=VALUE ...]

The same command resumes an interrupted run. Every host runs it, with a workdir that all of them can
read and write; see docs/tpu.md.
"""

import math
import sys

from absl import flags
import jax
from ml_collections import config_flags

from r3jax.checkpoint import training
from r3jax.cli import command_line
from r3jax.cli import startup
from r3jax.files import ownership
from r3jax.report import run_page
from r3jax.rewards.from_host import budget
from r3jax.run import health
from r3jax.run import loop
from r3jax.run import sessions

# What every process raises, with a message that a person reads.
_REFUSALS = (budget.BudgetExceeded, training.Unusable, health.Unhealthy)


def define_flags() -> None:
  """Defines the flags of the command."""
  config_flags.DEFINE_config_file(
    "config", None, "Config file by name or path, with its variant."
  )
  flags.DEFINE_string(
    "workdir", None, "Folder of the run; an interrupted run there is resumed."
  )
  flags.DEFINE_enum(
    "resume",
    "auto",
    sessions.RESUME_MODES,
    "'must' refuses a workdir without a checkpoint, 'never' one with a checkpoint.",
  )
  startup.define_flags()
  command_line.require(config="a config file", workdir="the folder of the run")


@ownership.releasing()
def run() -> None:
  """Trains, and exits with a message where the config or the workdir cannot be used."""
  config = flags.FLAGS.config
  workdir = flags.FLAGS.workdir
  startup.log_ours()
  # Of one host's CPUs, as many work as split every batch evenly.
  batch = math.gcd(config.groups_per_step, config.eval.batch_size)
  startup.start(config.mesh, batch, config.step.quick_compile)
  programs = startup.keep_programs(config.mesh)
  with startup.ending_together():
    session, policy = startup.together(
      sessions.prepare, config, workdir, flags.FLAGS.resume, programs
    )
    try:
      run_summary = loop.run(session, policy)
    except _REFUSALS as error:
      sys.exit(f"r3jax: {error}")
    except training.SaveFailed as error:
      if jax.process_count() > 1:
        raise  # ends the other processes
      sys.exit(f"r3jax: {error}")
  if jax.process_index():
    return
  summary = run_page.RunSummary.from_json(run_summary)
  print("\n".join(["", *run_page.closing_lines(summary, session.files.path)]))

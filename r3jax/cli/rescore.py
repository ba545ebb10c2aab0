"""Scores the images of an evaluation by another reward, and compares the two.

  r3jax rescore DIR --config=r3_geneval:shapes --judge=NAME [--config.reward.KEY=VALUE ...]

DIR is the folder of a finished evaluation; it gets judges/NAME.json and tables.
"""

import sys

from absl import flags
from ml_collections import config_flags

from r3jax.cli import command_line
from r3jax.cli import startup
from r3jax.files import rules
from r3jax.rewards.from_host import budget
from r3jax.run import evaluation_job

# It becomes the name of a file.
_JUDGE = rules.Text("letters, digits, '.', '-' and '_'", r"[\w.-]+")


def define_flags() -> None:
  """Defines the flags of the command."""
  config_flags.DEFINE_config_file(
    "config", None, "Config file by name or path, with its variant."
  )
  flags.DEFINE_string(
    "judge", "", "Name of the other reward in files and tables."
  )
  startup.define_flags()
  command_line.require(config="a config file")
  command_line.limit(judge=_JUDGE)


def run(folder: str) -> None:
  """Scores, and exits with a message where something cannot be used."""
  values = flags.FLAGS
  startup.log_ours()
  config = values.config
  startup.start(config.mesh, config.eval.batch_size, config.step.quick_compile)
  startup.keep_programs(config.mesh)
  with startup.ending_together():
    try:
      comparison = startup.together(
        evaluation_job.rescore, values.config, folder, values.judge
      )
      print(comparison.text)
      budget.check_evaluation(
        comparison.missing, values.config.reward.max_failed_fraction
      )
    except budget.BudgetExceeded as error:
      sys.exit(f"r3jax: {error}")

"""Evaluates a model on held-out prompts.

  r3jax evaluate --config=r3_geneval:shapes --workdir=DIR [--checkpoint=FOLDER]

Draws `eval.rounds` images in a chain, `eval.images_per_prompt` times for every prompt of
`data.heldout` (or `eval.prompts` of them), and asks the questions of `eval.ask` about the drafts.
The same command resumes where it was stopped. docs/evaluation.md describes the files.
"""

import sys

from absl import flags
import jax
from ml_collections import config_flags

from r3jax.cli import command_line
from r3jax.cli import startup
from r3jax.files import ownership
from r3jax.files import paths
from r3jax.report import evaluation_report
from r3jax.rewards.from_host import budget
from r3jax.run import evaluation_job


def define_flags() -> None:
  """Defines the flags of the command."""
  config_flags.DEFINE_config_file(
    "config", None, "Config file by name or path, with its variant."
  )
  flags.DEFINE_string(
    "checkpoint",
    "",
    "Folder of the model in BAGEL's format or converted, or workdir of a run, whose last "
    "checkpoint is evaluated. Default: model.folder.",
  )
  flags.DEFINE_string("workdir", None, "Folder to write.")
  startup.define_flags()
  command_line.require(config="a config file", workdir="the folder to write")


@ownership.releasing()
def run() -> None:
  """Evaluates, prints the tables, and exits with a message where something cannot be used."""
  values = flags.FLAGS
  startup.log_ours()
  config = values.config
  startup.start(config.mesh, config.eval.batch_size, config.step.quick_compile)
  programs = startup.keep_programs(config.mesh)
  with startup.ending_together():
    job = startup.together(
      evaluation_job.prepare,
      values.config,
      values.workdir,
      values.checkpoint,
      programs,
    )
    try:
      summary = evaluation_job.run(job)
    except budget.BudgetExceeded as error:
      sys.exit(f"r3jax: {error}")
  if jax.process_index():
    return
  print(evaluation_report.console_text(summary))
  print(f"\npage: {paths.absolute(job.folder) / 'index.html'}")

"""Trains a small BAGEL on the embedded world: towers first, then texts, then texts and flow.

  r3jax sft --config=sft_shapes --out=DIR

Writes a folder in BAGEL's format. It starts from nothing unless `config.start` names such a folder.
"""

import pathlib
import sys

from absl import flags
from absl import logging
from ml_collections import config_flags

from r3jax.cli import command_line
from r3jax.files import config_guard
from r3jax.files import ownership
from r3jax.sft import program


def define_flags() -> None:
  """Defines the flags of the command."""
  config_flags.DEFINE_config_file(
    "config", None, "Config file by name or path."
  )
  flags.DEFINE_string("out", None, "Folder to write, in BAGEL's format.")
  command_line.require(config="a config file", out="the folder to write")


@ownership.releasing()
def run() -> None:
  """Trains, and exits with a message where config.start or --out cannot be used."""
  logging.set_verbosity(logging.INFO)
  config = flags.FLAGS.config
  program.use_all_cores(config)
  try:
    start = program.load_start(config.start) if config.start else None
    config_guard.check_writable(flags.FLAGS.out, "--out")
    ownership.claim(flags.FLAGS.out)
  except ValueError as error:
    sys.exit(f"r3jax: {error}")
  program.run(config, pathlib.Path(flags.FLAGS.out), start)

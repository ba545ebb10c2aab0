"""Trains a small BAGEL on the embedded world: autoencoder, ViT, texts, then texts and flow together.

  python launch/sft.py --config=configs/sft_shapes.py --out=DIR

Writes a folder in BAGEL's format. It starts from nothing unless `config.start` names such a folder.
"""

import pathlib
import sys

from absl import app
from absl import flags
from absl import logging
from ml_collections import config_flags

from r3jax.sft import program

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Config file.", lock_config=True
)
_OUT = flags.DEFINE_string("out", None, "Folder to write, in BAGEL's format.")


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  logging.set_verbosity(logging.INFO)
  config = _CONFIG.value
  program.use_all_cores(config)
  try:
    start = program.load_start(config.start) if config.start else None
  except ValueError as error:
    sys.exit(f"r3jax: {error}")
  program.run(config, pathlib.Path(_OUT.value), start)


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "out"])
  app.run(main)

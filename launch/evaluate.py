"""Evaluates, compares, rescores: `r3jax evaluate`, `compare` and `rescore` by one path.

  python launch/evaluate.py --config=configs/r3_geneval.py:shapes --workdir=DIR [--checkpoint=DIR]
  python launch/evaluate.py compare A B ... --workdir=DIR
  python launch/evaluate.py rescore DIR --config=... --judge=NAME [--config.reward.KEY=VALUE ...]

`r3jax evaluate --help` and so on list all flags.
"""

import sys

from r3jax.cli import main

COMMANDS = ("compare", "rescore")

if __name__ == "__main__":
  arguments = sys.argv[1:]
  command = next((word for word in arguments if word in COMMANDS), "evaluate")
  if command in COMMANDS:
    arguments.remove(command)
  main.run_command(command, arguments)

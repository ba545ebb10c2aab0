r"""Evaluates, compares, rescores: `r3jax evaluate`, `compare`, `rescore`.

  python launch/evaluate.py --config=configs/r3_geneval.py:shapes --workdir=DIR \
    [--checkpoint=DIR]
  python launch/evaluate.py compare A B ... --workdir=DIR
  python launch/evaluate.py rescore DIR --config=... --judge=NAME \
    [--config.reward.KEY=VALUE ...]

`r3jax evaluate --help` and so on list all flags.
"""

import sys

from r3jax.cli import main

COMMANDS = ("compare", "rescore")

if __name__ == "__main__":
  arguments = sys.argv[1:]
  command = "evaluate"
  for word in arguments:
    if word in COMMANDS:
      command = word
      arguments.remove(word)
      break
  main.run_command(command, arguments)

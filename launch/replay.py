r"""Repeats an iteration whose update was skipped: `r3jax replay` by its path in the repository.

python launch/replay.py WORKDIR/skipped/step_NNNNNN
"""

import sys

from r3jax.cli import main

if __name__ == "__main__":
  main.run_command("replay", sys.argv[1:])

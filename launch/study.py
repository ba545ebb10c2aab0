r"""Trains the arms of a study, and tests the paper's claims with them: `r3jax study`.

  python launch/study.py STUDY --config=configs/r3_geneval.py:shapes --workdir=DIR [--seeds=3] \
    [--config.KEY=VALUE ...]

`r3jax study --help` lists all flags. docs/howto/study.md has the studies and their hours.
"""

import sys

from r3jax.cli import main

if __name__ == "__main__":
  main.run_command("study", sys.argv[1:])

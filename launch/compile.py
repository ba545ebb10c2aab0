r"""Compiles a run for a TPU slice: `r3jax compile` by its path.

  python launch/compile.py --config=configs/r3_geneval.py:v5p-128 \
    --topology=v5p:4x4x4 [--program=step|evaluate|generate] \
    [--out=FILE.json] [--find=1] [--config.KEY=VALUE ...]

`--help` lists all flags.
"""

import sys

from r3jax.cli import main

if __name__ == "__main__":
  main.run_command("compile", sys.argv[1:])

r"""Measures an iteration stage by stage: `r3jax benchmark` by its path.

  python launch/benchmark.py --config=configs/benchmark.py:peer [--json=FILE] \
    [--programs=fused,split,think,...] [--config.KEY=VALUE ...]

`--help` lists all flags.
"""

import sys

from r3jax.cli import main

if __name__ == "__main__":
  main.run_command("benchmark", sys.argv[1:])

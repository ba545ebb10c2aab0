"""Trains a small BAGEL on the embedded world: `r3jax sft` by its path.

  python launch/sft.py --config=configs/sft_shapes.py --out=DIR

`--help` lists all flags, and the keys of the config.
"""

import sys

from r3jax.cli import main

if __name__ == "__main__":
  main.run_command("sft", sys.argv[1:])

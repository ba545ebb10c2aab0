r"""Converts models between BAGEL's format and Orbax: `r3jax convert`.

  python launch/convert.py --source=DIR --out=DIR --format=orbax \
    [--dtype=bfloat16]

`--help` lists all flags.
"""

import sys

from r3jax.cli import main

if __name__ == "__main__":
  main.run_command("convert", sys.argv[1:])

"""Compares r3jax with the reference: `r3jax check-parity` by its path.

  python launch/check_parity.py --goldens=tests/goldens/tiny-a

`--help` lists all flags.
"""

import sys

from r3jax.cli import main

if __name__ == "__main__":
  main.run_command("check-parity", sys.argv[1:])

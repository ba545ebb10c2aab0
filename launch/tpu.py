r"""The main job: `r3jax train` by its path in the repository.

  python launch/tpu.py --config=configs/r3_geneval.py:shapes --workdir=DIR \
    [--config.KEY=VALUE ...]

`--help` lists all flags, and the keys of the config.
"""

import sys

from r3jax.cli import main

if __name__ == "__main__":
  main.run_command("train", sys.argv[1:])

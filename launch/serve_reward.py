"""Serves a reward over HTTP: `r3jax serve-reward` by its path.

  python launch/serve_reward.py --reward=shapes --port=8000

`--help` lists all flags.
"""

import sys

from r3jax.cli import main

if __name__ == "__main__":
  main.run_command("serve-reward", sys.argv[1:])

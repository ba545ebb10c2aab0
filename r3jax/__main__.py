"""`python -m r3jax` is the command `r3jax`."""

from r3jax.cli import main

if __name__ == "__main__":
  main.main()

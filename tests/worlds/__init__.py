"""Tests of r3jax.worlds."""

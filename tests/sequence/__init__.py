"""Tests of r3jax.sequence."""

"""Tests of r3jax.rewards."""

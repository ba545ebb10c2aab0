"""Tests of r3jax."""

"""BAGEL in Flax."""

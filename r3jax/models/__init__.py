"""BAGEL in Linen: pure functions of parameters and layouts."""

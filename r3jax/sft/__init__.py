"""Supervised training of the small BAGEL."""

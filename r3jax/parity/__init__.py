"""Comparison with recorded numbers of the reference, on any folder in the format of the goldens."""

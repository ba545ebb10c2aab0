"""Rewards that Python computes outside of the compiled step."""

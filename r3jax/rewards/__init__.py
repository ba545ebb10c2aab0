"""Rewards: formats, the in-graph verifier, protocols."""

"""Rewards that services compute."""

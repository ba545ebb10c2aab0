"""Metrics, times and samples of a run, and where they are written."""

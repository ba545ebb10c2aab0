"""Prompt records, TFDS builders and the Grain pipeline."""

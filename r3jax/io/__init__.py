"""Checkpoints, images and reports."""

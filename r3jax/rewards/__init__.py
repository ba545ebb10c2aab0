"""Rewards of images, and how they are combined."""

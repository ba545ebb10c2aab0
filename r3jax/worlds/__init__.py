"""Worlds: what prompts ask for and how images are verified."""

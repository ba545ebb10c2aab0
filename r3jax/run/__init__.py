"""A training run: what its config describes, its session, its loop and its summary."""

"""A policy at work: rollouts of the three stages, and the passes that score them."""

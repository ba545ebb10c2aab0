"""Acts for a policy: rollouts of the stages and the passes that score them."""

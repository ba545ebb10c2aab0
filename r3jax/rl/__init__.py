"""The R3 iteration: rollouts, rewards, advantages, losses, updates. Start at `iteration.py`."""

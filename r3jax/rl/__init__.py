"""Rollouts, advantages, losses and the fused train step."""

"""The terms of the objective, one formula a function (R3.md section 8).

Every function returns per-item terms; `step.py` sums them and divides by the totals over all
groups and replicas, so the loss does not depend on the device count.
"""

import jax
import jax.numpy as jnp

EPSILON = 1e-4  # added to the totals T and J


def clipped_policy(
  log_ratio: jax.Array, advantage: jax.Array, clip_range: float
) -> jax.Array:
  """Returns -min(R A, clip(R, 1 - c, 1 + c) A) with R = exp(log_ratio), elementwise."""
  ratio = jnp.exp(log_ratio)
  clipped = jnp.clip(ratio, 1 - clip_range, 1 + clip_range)
  return -jnp.minimum(ratio * advantage, clipped * advantage)


def k3(logprob: jax.Array, reference_logprob: jax.Array) -> jax.Array:
  """Returns exp(d) - d - 1 with d = reference logprob - logprob, elementwise; never negative."""
  d = reference_logprob - logprob
  return jnp.exp(d) - d - 1


def token_mask(lengths: jax.Array, capacity: int) -> jax.Array:
  """Returns which entries of a log-prob array carry loss, [B, capacity - 1].

  Entry j belongs to ids[:, j + 1]; the begin token and the final end token carry none, so n ids
  leave the n - 2 entries 0 .. n - 3.
  """
  return jnp.arange(capacity - 1) < lengths[:, None] - 2

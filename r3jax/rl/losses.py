"""The terms of the objective, one formula a function (docs/algorithm.md#objective).

Every function is elementwise. `objective.py` sums the terms over tokens and images, and divides the
sums by totals over all replicas, so that the loss does not depend on the number of devices.
"""

import jax
import jax.numpy as jnp

from r3jax import types

EPSILON = 1e-4  # added to the totals T (tokens) and J (images)


def clipped_policy(
  log_ratio: jax.Array, advantage: jax.Array, clip_range: float
) -> jax.Array:
  """Returns the clipped policy term of PPO and GRPO (arXiv 2402.03300), elementwise.

    -min(ρ A, clip(ρ, 1 - c, 1 + c) A)  with ρ = exp(log_ratio)

  Args:
    log_ratio: log ρ, logprob minus behavior logprob.
    advantage: A, broadcast against `log_ratio`.
    clip_range: c.
  """
  ratio = jnp.exp(log_ratio)
  # The minimum keeps the gradient where the policy has moved the wrong way.
  clipped_ratio = jnp.clip(ratio, 1 - clip_range, 1 + clip_range)
  return -jnp.minimum(ratio * advantage, clipped_ratio * advantage)


def k3(logprob: jax.Array, reference_logprob: jax.Array) -> jax.Array:
  """Returns the k3 estimate of the KL to the reference, elementwise; never negative.

    exp(d) - d - 1  with d = reference_logprob - logprob

  Source: docs/algorithm.md#kl (GRPO, arXiv 2402.03300, equation 4).
  """
  d = reference_logprob - logprob
  return jnp.exp(d) - d - 1


def token_mask(lengths: types.Lengths, capacity: int) -> jax.Array:
  """Returns which entries of a log-prob array carry loss, bool [B, capacity - 1].

  Entry j belongs to ids[:, j + 1]; the begin token and the final end token carry no loss, so n ids
  leave the n - 2 entries 0 .. n - 3.

  Args:
    lengths: slots in use, begin and end included.
    capacity: slots of the text segment.
  """
  return jnp.arange(capacity - 1) < lengths[:, None] - 2

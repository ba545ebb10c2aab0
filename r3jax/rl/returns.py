"""Returns and group-relative advantages of both stages (R3.md section 7)."""

import jax
import jax.numpy as jnp

from r3jax import types


def group_advantage(
  value: jax.Array, valid: jax.Array, divide_by_std: bool
) -> jax.Array:
  """Returns value minus the mean of the group's valid values, 0 where invalid.

  A group with fewer than two valid samples has nothing to compare and gets zeros.

  Args:
    value: [G, M] returns; read only where valid.
    valid: [G, M].
    divide_by_std: also divide by the group's standard deviation (of a sample: n - 1) + 1e-6.
  """
  count = valid.sum(axis=1, keepdims=True)
  kept = jnp.where(valid, value, 0.0).astype(float)  # as wide as JAX is set to
  centred = kept - kept.sum(axis=1, keepdims=True) / jnp.maximum(count, 1)
  centred = jnp.where(valid & (count >= 2), centred, 0.0)
  if not divide_by_std:
    return centred
  std = jnp.sqrt(
    (centred**2).sum(axis=1, keepdims=True) / jnp.maximum(count - 1, 1)
  )
  return centred / (std + 1e-6)


def reason_return(
  score: types.PerSample, format_reward: types.PerSample, format_weight: float
):
  """Returns the text return of the reason stage, f r + w_f f."""
  return format_reward * score + format_weight * format_reward


def improvement(
  score: types.PerSample, before: types.PerSample, stop: types.Flags
):
  """Returns d = r - r0, or 1 where r0 = 1 and the instruction says to stop."""
  return jnp.where((before == 1) & stop, 1.0, score - before)


def reflect_return(
  score: types.PerSample,
  before: types.PerSample,
  stop: types.Flags,
  format_reward: types.PerSample,
  format_weight: float,
):
  """Returns the text return of the reflect stage, f d + w_f f."""
  return (
    format_reward * improvement(score, before, stop)
    + format_weight * format_reward
  )

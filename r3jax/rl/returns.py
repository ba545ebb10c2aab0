"""Returns and group-relative advantages (docs/algorithm.md#returns, docs/algorithm.md#advantages).

Group-relative advantages are those of GRPO (arXiv 2402.03300); returns are those of R3
(arXiv 2602.15772).
"""

import flax.struct
import jax
import jax.numpy as jnp

from r3jax.rl import group_table
from r3jax.rl import iteration_settings

_STD_EPSILON = (
  1e-6  # keeps the division finite where all returns of a group are equal
)


@flax.struct.dataclass
class Advantages:
  """What the losses of both modalities weigh samples with.

  Attributes:
    text: A of the sampled text; 0 where the sample does not count.
    image: A of the sampled image; 0 where the sample does not count, or nothing
      was edited.
    counts: whether the sample takes part in the update.
  """

  text: jax.Array  # [G, M], or [B] on one replica
  image: jax.Array  # [G, M], or [B] on one replica
  counts: jax.Array  # [G, M] bool, or [B] on one replica


def reason_return(
  reward: jax.Array, format_reward: jax.Array, format_weight: float
) -> jax.Array:
  """Returns the text return of the reason stage, f r + w_f f, elementwise."""
  return format_reward * reward + format_weight * format_reward


def improvement(
  reward: jax.Array, reward_before: jax.Array, stop: jax.Array
) -> jax.Array:
  """Returns d = r - r₀, elementwise; d = 1 where r₀ = 1 and the instruction says to stop."""
  rightly_stopped = (reward_before == 1) & stop
  return jnp.where(rightly_stopped, 1.0, reward - reward_before)


def reflect_return(
  reward: jax.Array,
  reward_before: jax.Array,
  stop: jax.Array,
  format_reward: jax.Array,
  format_weight: float,
) -> jax.Array:
  """Returns the text return of the reflect stage, f d + w_f f, elementwise; see `improvement`."""
  difference = improvement(reward, reward_before, stop)
  return format_reward * difference + format_weight * format_reward


def comparable(valid: group_table.Flags) -> group_table.Flags:
  """Returns the valid samples of the groups that have at least two of them.

  A sample that is the only valid one of its group has nothing to be compared with.
  """
  return valid & (valid.sum(axis=1, keepdims=True) >= 2)


def _has_spread(
  value: group_table.Values, valid: group_table.Flags
) -> jax.Array:
  """Returns whether valid returns of a group differ, bool [G, 1]."""
  largest = jnp.where(valid, value, -jnp.inf).max(axis=1, keepdims=True)
  smallest = jnp.where(valid, value, jnp.inf).min(axis=1, keepdims=True)
  return largest > smallest


def group_advantage(
  value: group_table.Values, valid: group_table.Flags, divide_by_std: bool
) -> group_table.Values:
  """Returns the advantages Aᵢ = Rᵢ - mean(R) of every group, 0 where invalid.

  Mean and standard deviation are over the group's valid samples. A group with fewer than two of
  them, or with equal returns, gets zeros. R3 does not divide by the standard deviation, GRPO does.

  Args:
    value: R, the returns; read only where valid.
    valid: which samples count.
    divide_by_std: whether to divide by the group's standard deviation (that of
      a sample: n - 1) plus 1e-6.
  """
  num_valid = valid.sum(axis=1, keepdims=True)
  # A missing reward may be NaN, and 0 * NaN is NaN: it must go before the sum.
  # astype(float) is as wide as JAX is set to: float32, or float64 in tests.
  value = jnp.where(valid, value, 0.0).astype(float)
  mean = value.sum(axis=1, keepdims=True) / jnp.maximum(num_valid, 1)
  # Equal returns differ from their rounded mean, and a deviation of the same size would blow that
  # up: they get 0. Invalid entries would otherwise hold -mean.
  differs = _has_spread(value, valid) & (num_valid >= 2)
  centered = jnp.where(valid & differs, value - mean, 0.0)
  if not divide_by_std:
    return centered
  square_sum = (centered**2).sum(axis=1, keepdims=True)
  std = jnp.sqrt(square_sum / jnp.maximum(num_valid - 1, 1))
  return centered / (std + _STD_EPSILON)


def reason_advantages(
  table: group_table.ReasonTable, loss: iteration_settings.LossSettings
) -> Advantages:
  """Returns the advantages [G, M] of the reason stage; the image return is r."""
  counts = comparable(table.valid)
  text_return = reason_return(
    table.reward, table.format_reward, loss.format_weight
  )
  return Advantages(
    text=group_advantage(text_return, counts, loss.divide_by_std),
    image=group_advantage(table.reward, counts, loss.divide_by_std),
    counts=counts,
  )


def edit_advantages(
  table: group_table.EditTable,
  loss: iteration_settings.LossSettings,
  own_sources: bool,
) -> Advantages:
  """Returns the advantages [G, M] of the reflect and refine stages.

  The image return is r where a group shares its source, and r - r₀ where every sample has its own.
  Advantages are differences inside a group, so that with a shared source both are the same.

  Args:
    table: the stages' samples.
    loss: weights of the objective.
    own_sources: whether every sample starts from an image of its own.
  """
  counts = comparable(table.valid)
  text_return = reflect_return(
    table.reward,
    table.reward_before,
    table.stop,
    table.format_reward,
    loss.format_weight,
  )
  image_return = table.reward
  if own_sources:
    # With r alone, a sample that starts from a better image would be rewarded for that.
    image_return = table.reward - table.reward_before
  image = group_advantage(image_return, counts, loss.divide_by_std)
  return Advantages(
    text=group_advantage(text_return, counts, loss.divide_by_std),
    # The image of a sample that stops was not sampled, so it teaches the image expert nothing.
    image=jnp.where(table.stop, 0.0, image),
    counts=counts,
  )

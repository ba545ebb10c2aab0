"""Tables of two groups of three samples, for tests with numbers worked out by hand."""

import jax.numpy as jnp
import numpy as np

from r3jax.rl import group_table
from r3jax.rl import iteration_settings

LOSS = iteration_settings.LossSettings(
  text_weight=1.0,
  image_weight=2.0,
  text_kl=0.001,
  image_kl=0.001,
  clip_range=0.2,
  image_clip_range=0.2,
  divide_by_std=False,
  format_weight=1.0,
)


def reason_table() -> group_table.ReasonTable:
  """Returns a group with three rewards, and one whose only reward compares with nothing."""
  return group_table.ReasonTable(
    reward=jnp.array([[1.0, 0.0, 0.5], [0.2, np.nan, 0.4]]),
    valid=jnp.array([[True, True, True], [True, False, False]]),
    parts={"strict": jnp.array([[1.0, 0.0, np.nan], [1.0, 0.5, 0.5]])},
    format_reward=jnp.array([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]]),
    num_tokens=jnp.array([[3, 4, 5], [6, 6, 6]]),
    at_limit=jnp.array([[False, False, False], [True, True, True]]),
    is_finite=jnp.array([[True, True, True], [True, False, True]]),
    sde_time=jnp.array([[0.95] * 3, [0.5] * 3]),
  )


def edit_table() -> group_table.EditTable:
  """Returns a group that edits a perfect image, and one that edits another image."""
  return group_table.EditTable(
    reward=jnp.array([[1.0, 1.0, 0.4], [0.7, 0.5, 0.2]]),
    valid=jnp.ones((2, 3), bool),
    parts={},
    format_reward=jnp.ones((2, 3)),
    num_tokens=jnp.full((2, 3), 4),
    at_limit=jnp.zeros((2, 3), bool),
    is_finite=jnp.ones((2, 3), bool),
    reward_before=jnp.array([[1.0, 1.0, 1.0], [0.5, 0.5, 0.5]]),
    stop=jnp.array([[True, True, False], [False, True, False]]),
    truncated=jnp.array([[False, False, True], [False, False, False]]),
    prompt_index=jnp.ones((2, 3), jnp.int32),
  )

"""The pool: which image a group of the reflect stage starts from (docs/algorithm.md#pool).

R3's Tree-RL: instead of continuing every chain, groups draw their source image from all images of
an earlier stage.
"""

import flax.struct
import jax
import jax.numpy as jnp

from r3jax import types


@flax.struct.dataclass
class ScoredImages:
  """Images that can be reflected on.

  The images of one stage are rows of samples, a *pool* is all of them over all groups and replicas
  (P = G M), and *sources* are what reflections start from: rows of groups where the samples of a
  group share a source, rows of samples where each has its own.

  Attributes:
    images: 8-bit RGB.
    reward: r of every image; read it only where `valid`.
    valid: whether the reward is there.
    parts: parts of the reward by name.
    prompt_index: which of the iteration's prompts the image was made for.
  """

  images: types.Images  # [P, H, W, 3]
  reward: jax.Array  # [P] float32
  valid: jax.Array  # [P] bool
  parts: dict[str, jax.Array]  # [P] float32 each
  prompt_index: jax.Array  # [P] int32


def _uniform_over(eligible: jax.Array, uniform: jax.Array) -> jax.Array:
  """Returns the index of the eligible entry that `uniform` in [0, 1) picks, [] int32."""
  num_before = jnp.cumsum(
    eligible
  )  # eligible entries up to each one, itself included
  num_eligible = num_before[-1]
  # The rounded product may reach num_eligible.
  rank = jnp.minimum(jnp.floor(uniform * num_eligible), num_eligible - 1)
  return jnp.argmax(num_before > rank)


def draw(
  key: types.Key,
  reward: jax.Array,
  valid: jax.Array,
  perfect_probability: float,
) -> jax.Array:
  """Draws one image of the pool.

  With `perfect_probability` it is one of reward 1, otherwise one of the others; where a side is
  empty, it comes from the other side. Each image of a side is equally likely. Images without a
  reward are never drawn unless there are no others; then the drawing group is invalid.

  Args:
    key: random key of the drawing group.
    reward: [P] of every image.
    valid: [P] whether the reward is there.
    perfect_probability: probability of the perfect side, in [0, 1].

  Returns:
    Index into the pool, [] int32.
  """
  # Perfect is a reward of exactly 1, the upper bound of rewards.
  side_key, image_key = jax.random.split(key)
  perfect = valid & (reward == 1)
  imperfect = valid & (reward != 1)
  wants_perfect = jax.random.uniform(side_key) < perfect_probability
  # From the other side where the wanted one is empty.
  takes_perfect = jnp.where(wants_perfect, perfect.any(), ~imperfect.any())
  side = jnp.where(takes_perfect, perfect, imperfect)
  return _uniform_over(side, jax.random.uniform(image_key))

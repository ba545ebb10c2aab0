"""The tree: which image of the reason stage a group reflects on (R3.md section 7)."""

import jax
import jax.numpy as jnp

from r3jax import types


def _uniform_over(eligible: jax.Array, uniform: jax.Array) -> jax.Array:
  """Returns the index of the entry that `uniform` in [0, 1) picks among the eligible ones."""
  count = jnp.cumsum(eligible)
  place = jnp.minimum(jnp.floor(uniform * count[-1]), count[-1] - 1)
  return jnp.argmax(count > place)


def draw(
  key: types.Key, score: jax.Array, valid: jax.Array, perfect: float
) -> jax.Array:
  """Draws one image of the pool.

  With probability `perfect` from the images of score 1, else from the others; from the other side
  where one is empty; uniform inside a side. Images without a score are never drawn, unless there
  is no other (then the result means nothing and the caller's group is invalid).

  Args:
    key: of the drawing group.
    score: [P] task rewards of every image of every group.
    valid: [P] whether the reward is there.
    perfect: probability of the perfect side.

  Returns:
    [] int32 index into the pool.
  """
  side_key, image_key = jax.random.split(key)
  best, rest = valid & (score == 1), valid & (score != 1)
  wants_best = jax.random.uniform(side_key) < perfect
  takes_best = jnp.where(wants_best, best.any(), ~rest.any())
  return _uniform_over(
    jnp.where(takes_best, best, rest), jax.random.uniform(image_key)
  )

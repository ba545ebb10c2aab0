"""The control experiment in which the images do not matter."""

import jax
import jax.numpy as jnp

from r3jax import types
from r3jax.parallel import collectives


def shuffled(reward: types.Scoring, seed: int, axis: str) -> types.Scoring:
  """Returns a reward that deals the scores of all replicas' samples out in a random order.

  The order is drawn from a digest of the images, so that it differs every time and does not depend
  on the number of replicas. The format of thoughts still pays, and so does stopping at an image
  whose score is perfect.

  Args:
    reward: scores images inside the mapped step.
    seed: decides the order, together with the images.
    axis: name of the mapped axis.
  """

  def score(images: types.Images, target, needed=None) -> types.Score:
    del needed  # every score is dealt out
    rows = images.shape[0]
    scores = collectives.all_gather(reward(images, target), axis)
    digest = collectives.psum(jnp.sum(images, dtype=jnp.uint32), axis)
    key = jax.random.fold_in(jax.random.key(seed), digest)
    order = jax.random.permutation(key, len(scores.value))
    own_rows = jax.lax.dynamic_slice_in_dim(
      order, jax.lax.axis_index(axis) * rows, rows
    )
    return jax.tree.map(lambda x: x[own_rows], scores)

  return score

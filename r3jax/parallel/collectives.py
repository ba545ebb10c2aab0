"""Sums, maxima and gathers over a mapped axis, which on an axis of one member are nothing.

They are left out there, for XLA's partitioner refuses them for TPUs (libtpu 0.0.42: "must be in
(partial) manual partitioning mode").
"""

from collections.abc import Callable

import jax


def _over_several(collective: Callable) -> Callable:
  return lambda tree, axis: (
    tree if jax.lax.axis_size(axis) == 1 else collective(tree, axis)
  )


total = _over_several(jax.lax.psum)
largest = _over_several(jax.lax.pmax)
gathered = _over_several(
  lambda tree, axis: jax.tree.map(
    lambda x: jax.lax.all_gather(x, axis, tiled=True), tree
  )
)

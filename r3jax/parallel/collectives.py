"""Sums, maxima and gathers of trees over a mapped axis; an axis of one member needs none.

They are left out there, because XLA's partitioner refuses them for TPUs (libtpu 0.0.42: "must be in
(partial) manual partitioning mode").
"""

from typing import Any

import jax


def _has_one_member(axis: str) -> bool:
  return jax.lax.axis_size(axis) == 1


def psum(tree: Any, axis: str) -> Any:
  """Returns the sum of every leaf over the members of a mapped axis."""
  return tree if _has_one_member(axis) else jax.lax.psum(tree, axis)


def pmax(tree: Any, axis: str) -> Any:
  """Returns the maximum of every leaf over the members of a mapped axis."""
  return tree if _has_one_member(axis) else jax.lax.pmax(tree, axis)


def all_gather(tree: Any, axis: str) -> Any:
  """Returns the rows of every leaf of all members of a mapped axis, one after another."""
  if _has_one_member(axis):
    return tree
  return jax.tree.map(lambda x: jax.lax.all_gather(x, axis, tiled=True), tree)

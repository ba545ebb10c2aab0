"""Which groups and samples a replica holds, and their randomness.

Samples are numbered group by group over the whole iteration; replica r of R holds the r-th R-th of
them: whole groups, or a part of one group that it shares with its neighbours. Keys depend on the
group and the sample, never on the replica.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from r3jax.agent import experience
from r3jax.agent import random_keys
from r3jax.parallel import collectives

AXIS = "data"  # the mesh axis that the step is mapped over
STAGES = ("reason", "reflect", "refine")


def check(groups: int, group_size: int, replicas: int, micro_batches: int):
  """Raises ValueError unless the samples split evenly over replicas and micro-batches, group by group."""
  if (groups * group_size) % replicas:
    raise ValueError(
      f"groups_per_step * group_size ({groups} * {group_size}) must be divisible by the number of"
      f" data replicas ({replicas})"
    )
  if groups % replicas and replicas % groups:
    raise ValueError(
      f"groups_per_step ({groups}) must be a multiple or a divisor of the number of data replicas"
      f" ({replicas}), so that every replica holds whole groups or a part of one"
    )
  place = Placement(groups, group_size, replicas)
  if place.samples % (
    micro_batches // math.gcd(micro_batches, place.local_groups)
  ):
    raise ValueError(
      f"step.micro_batches ({micro_batches}) must split the samples of a data replica "
      f"({place.local_groups} groups of {place.samples}) into whole groups or equal parts of groups"
    )


@dataclasses.dataclass(frozen=True)
class Placement:
  """Inside the mapped step: this replica's share.

  Attributes:
    groups: of the iteration.
    group_size: samples of a group.
    replicas: size of the mapped axis.
  """

  groups: int
  group_size: int
  replicas: int

  @property
  def rows(self) -> int:
    """Samples on this replica."""
    return self.groups * self.group_size // self.replicas

  @property
  def samples(self) -> int:
    """Samples of one group on this replica."""
    return min(self.group_size, self.rows)

  @property
  def local_groups(self) -> int:
    """Groups of which this replica holds samples."""
    return self.rows // self.samples

  def first_row(self) -> jax.Array:
    """Returns the number of this replica's first sample."""
    return jax.lax.axis_index(AXIS) * self.rows

  def group_ids(self) -> jax.Array:
    """Returns the numbers of this replica's groups, [local_groups]."""
    return self.first_row() // self.group_size + jnp.arange(self.local_groups)

  def keys(self, key: jax.Array, stage: str, turn: int = 0) -> random_keys.Keys:
    """Returns the keys of a stage.

    Args:
      key: of the iteration.
      stage: one of STAGES.
      turn: how often the stage has run before in this iteration.
    """
    stage_key = jax.random.fold_in(
      key, turn * len(STAGES) + STAGES.index(stage)
    )
    # Two branches: a child of a group's key may equal one that the group splits off for itself.
    of_groups, of_samples = (
      jax.random.fold_in(stage_key, branch) for branch in (0, 1)
    )
    groups = jax.vmap(lambda group: jax.random.fold_in(of_groups, group))(
      self.group_ids()
    )
    ids = self.first_row() + jnp.arange(self.rows)
    samples = jax.vmap(lambda i: jax.random.fold_in(of_samples, i))(ids)
    return random_keys.Keys(groups, samples)

  def local_prompts(self, prompts: experience.Prompts) -> experience.Prompts:
    """Returns the rows of this replica's groups from the prompts of the whole iteration."""
    take = lambda x: jax.lax.dynamic_slice_in_dim(
      x, self.first_row() // self.group_size, self.local_groups
    )
    return jax.tree.map(take, prompts)

  def repeat(self, tree):
    """Repeats rows of groups into rows of samples."""
    return jax.tree.map(lambda x: jnp.repeat(x, self.samples, axis=0), tree)

  def micro_batches(self, groups, samples, number: int):
    """Cuts this replica's rows into equal parts: whole groups, or the same part of each group.

    Args:
      groups: tree of rows of groups, [local_groups, ...].
      samples: tree of rows of samples, [rows, ...].
      number: of parts, see `check`.

    Returns:
      Both trees with a leading axis of parts.
    """
    by_group = math.gcd(number, self.local_groups)
    by_sample = number // by_group
    size = self.samples // by_sample

    def cut_groups(x):
      parts = x.reshape(by_group, -1, *x.shape[1:])
      return jnp.repeat(parts, by_sample, axis=0)

    def cut_samples(x):
      cells = x.reshape(
        by_group, self.local_groups // by_group, by_sample, size, *x.shape[1:]
      )
      return jnp.moveaxis(cells, 2, 1).reshape(number, -1, *x.shape[1:])

    return jax.tree.map(cut_groups, groups), jax.tree.map(cut_samples, samples)

  def gather(self, tree):
    """Returns the rows of all replicas, in sample order."""
    return collectives.gathered(tree, AXIS)

  def by_group(self, x: jax.Array) -> jax.Array:
    """Returns a per-sample array of this replica as the whole iteration's [groups, group_size]."""
    return self.gather(x).reshape(self.groups, self.group_size, *x.shape[1:])

  def local_rows(self, by_group: jax.Array) -> jax.Array:
    """Returns this replica's samples of a [groups, group_size, ...] array."""
    flat = by_group.reshape(-1, *by_group.shape[2:])
    return jax.lax.dynamic_slice_in_dim(flat, self.first_row(), self.rows)

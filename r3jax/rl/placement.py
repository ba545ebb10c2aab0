"""Which groups and samples a replica holds, and their random keys.

Samples are numbered group by group over the whole iteration. Replica r of R holds the r-th of R
equal parts of them: whole groups, or a part of one group that it shares with its neighbors. Keys
depend on the number of the group and of the sample, never on the replica
(docs/algorithm.md#randomness).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from r3jax.agent import experience
from r3jax.agent import random_keys
from r3jax.parallel import collectives

AXIS = "data"  # the mesh axis that an iteration is mapped over
STAGES = ("reason", "reflect", "refine")


def check(
  num_groups: int, group_size: int, num_replicas: int, num_micro_batches: int
):
  """Checks that the samples split evenly over replicas and micro-batches, group by group.

  Raises:
    ValueError: they do not; the message names the config's keys.
  """
  if (num_groups * group_size) % num_replicas:
    raise ValueError(
      f"groups_per_step * group_size ({num_groups} * {group_size}) must be divisible by the number"
      f" of data replicas ({num_replicas})"
    )
  if num_groups % num_replicas and num_replicas % num_groups:
    raise ValueError(
      f"groups_per_step ({num_groups}) must be a multiple or a divisor of the number of data"
      f" replicas ({num_replicas}), so that every replica holds whole groups or a part of one"
    )
  # Micro-batches are whole groups as far as possible, and then equal parts of each group.
  place = Placement(num_groups, group_size, num_replicas)
  parts_of_group = num_micro_batches // math.gcd(
    num_micro_batches, place.num_local_groups
  )
  if place.samples_per_group % parts_of_group:
    raise ValueError(
      f"step.micro_batches ({num_micro_batches}) must split the samples of a data replica "
      f"({place.num_local_groups} groups of {place.samples_per_group}) into whole groups or equal "
      "parts of groups"
    )


@dataclasses.dataclass(frozen=True)
class Placement:
  """The share of a replica; methods that return arrays run inside the mapped step.

  Attributes:
    num_groups: groups of the iteration (G).
    group_size: samples of a group (M).
    num_replicas: size of the mapped axis (R).
  """

  num_groups: int
  group_size: int
  num_replicas: int

  @property
  def num_rows(self) -> int:
    """Samples on this replica (B = G M / R)."""
    return self.num_groups * self.group_size // self.num_replicas

  @property
  def samples_per_group(self) -> int:
    """Samples of one group on this replica."""
    return min(self.group_size, self.num_rows)

  @property
  def num_local_groups(self) -> int:
    """Groups of which this replica holds samples."""
    return self.num_rows // self.samples_per_group

  def first_row(self) -> jax.Array:
    """Returns the number of this replica's first sample, [] int32."""
    return jax.lax.axis_index(AXIS) * self.num_rows

  def first_group(self) -> jax.Array:
    """Returns the number of this replica's first group, [] int32."""
    return self.first_row() // self.group_size

  def row_ids(self) -> jax.Array:
    """Returns the numbers of this replica's samples, [num_rows]."""
    return self.first_row() + jnp.arange(self.num_rows)

  def group_ids(self) -> jax.Array:
    """Returns the numbers of this replica's groups, [num_local_groups]."""
    return self.first_group() + jnp.arange(self.num_local_groups)

  def keys(self, key: jax.Array, stage: str, turn: int = 0) -> random_keys.Keys:
    """Returns the keys of a stage.

    Args:
      key: key of the iteration.
      stage: one of STAGES.
      turn: number of times that the stage has run before in this iteration.
    """
    stage_number = turn * len(STAGES) + STAGES.index(stage)
    stage_key = jax.random.fold_in(key, stage_number)
    # Two branches: a child of a group's key could equal a key that the group splits off for itself.
    groups_key = jax.random.fold_in(stage_key, 0)
    samples_key = jax.random.fold_in(stage_key, 1)
    fold_in_each = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    return random_keys.Keys(
      group=fold_in_each(groups_key, self.group_ids()),
      sample=fold_in_each(samples_key, self.row_ids()),
    )

  def local_prompts(self, prompts: experience.Prompts) -> experience.Prompts:
    """Returns the rows of this replica's groups from the prompts of the whole iteration."""
    # A dynamic slice, for the start depends on the replica and the program does not.
    start = self.first_group()

    def take(x: jax.Array) -> jax.Array:
      return jax.lax.dynamic_slice_in_dim(x, start, self.num_local_groups)

    return jax.tree.map(take, prompts)

  def repeat(self, tree):
    """Repeats rows of groups so that there is one for every sample of this replica.

    Rows of samples stay as they are.
    """

    def repeat_rows(x: jax.Array) -> jax.Array:
      return jnp.repeat(x, self.num_rows // x.shape[0], axis=0)

    return jax.tree.map(repeat_rows, tree)

  def micro_batches(self, by_group, by_sample, num_parts: int):
    """Cuts this replica's rows into equal parts: whole groups, or the same part of each group.

    Args:
      by_group: tree of rows of groups, [num_local_groups, ...]; or of samples,
        where each has a row of its own.
      by_sample: tree of rows of samples, [num_rows, ...].
      num_parts: number of parts, see `check`.

    Returns:
      Both trees with a leading axis of parts.
    """
    # As in `check`: the groups are cut into `group_parts`, and the samples of
    # each group into `sample_parts`.
    group_parts = math.gcd(num_parts, self.num_local_groups)
    sample_parts = num_parts // group_parts
    groups_of_part = self.num_local_groups // group_parts
    samples_of_part = self.samples_per_group // sample_parts

    def cut_groups(x: jax.Array) -> jax.Array:
      if x.shape[0] == self.num_rows:
        return cut_samples(x)
      # All parts of a group read the same row of it.
      parts = x.reshape(group_parts, groups_of_part, *x.shape[1:])
      return jnp.repeat(parts, sample_parts, axis=0)

    def cut_samples(x: jax.Array) -> jax.Array:
      # [group part, group, sample part, sample, ...]
      cells = x.reshape(
        group_parts, groups_of_part, sample_parts, samples_of_part, *x.shape[1:]
      )
      parts = jnp.moveaxis(cells, 2, 1)
      return parts.reshape(num_parts, -1, *x.shape[1:])

    return (
      jax.tree.map(cut_groups, by_group),
      jax.tree.map(cut_samples, by_sample),
    )

  def gather(self, tree):
    """Returns the rows of all replicas, in the order of the samples."""
    return collectives.all_gather(tree, AXIS)

  def by_group(self, tree):
    """Returns this replica's rows of samples as tables of the whole iteration, [G, M, ...]."""

    def as_table(x: jax.Array) -> jax.Array:
      return x.reshape(self.num_groups, self.group_size, *x.shape[1:])

    return jax.tree.map(as_table, self.gather(tree))

  def local_rows(self, tables):
    """Returns this replica's rows of samples from tables of the whole iteration, [G, M, ...]."""
    start = self.first_row()

    def take(table: jax.Array) -> jax.Array:
      rows = table.reshape(-1, *table.shape[2:])
      return jax.lax.dynamic_slice_in_dim(rows, start, self.num_rows)

    return jax.tree.map(take, tables)

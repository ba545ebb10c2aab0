"""Which mesh axes shard which logical axis, and the shardings that follow.

Parameters and activations name their dimensions; `Rules` give the mesh axes of every name. Training
and rollouts have rules of their own over the same mesh: training gathers a layer's weights when it
needs them, a rollout must not, because it needs them once per token.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from r3jax import types

DATA = "data"  # the step is mapped over this mesh axis by hand
INNER = ("fsdp", "tensor")  # the compiler partitions over these
LOGICAL = (
  "embed",
  "table",
  "vocab",
  "heads",
  "kv_heads",
  "mlp",
  "gen_mlp",
  "rows",
)


@dataclasses.dataclass(frozen=True)
class Rules:
  """The mesh axes of every logical axis, which may be none.

  Attributes:
    pairs: (logical axis, mesh axes). "rows" are the rows of a batch inside a data replica, "table"
      is the width of the token embeddings, "mlp" and "gen_mlp" are the hidden widths of the und and
      of the gen expert; the others are dimensions of parameters, and of the activations that they
      produce.
  """

  pairs: tuple[tuple[str, tuple[str, ...]], ...]

  @classmethod
  def of(cls, axes: Mapping[str, tuple[str, ...]]) -> "Rules":
    """Returns rules; an axis that is not named is not sharded.

    Raises:
      ValueError: a logical or mesh axis is unknown.
    """
    unknown_names = set(axes) - set(LOGICAL)
    unknown_axes = set().union(*axes.values()) - set(INNER)
    unknown = sorted(unknown_names) + sorted(unknown_axes)
    if unknown:
      raise ValueError(
        f"sharding rules must map {LOGICAL} to axes among {INNER}; unknown: {unknown}"
      )
    pairs = [(name, tuple(mesh_axes)) for name, mesh_axes in axes.items()]
    return cls(tuple(pairs))

  def axes(self, name: str | None) -> tuple[str, ...]:
    """Returns the mesh axes of a logical axis; none for None."""
    for logical, mesh_axes in self.pairs:
      if logical == name:
        return mesh_axes
    return ()

  def num_parts(self, name: str | None) -> int:
    """Returns over how many devices the context's mesh splits a logical axis of a parameter."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = [axis for axis in self.axes(name) if _is_auto(mesh, axis)]
    return math.prod(mesh.shape[axis] for axis in axes)

  def spec(
    self,
    shape: tuple[int, ...],
    names: tuple[str | None, ...],
    without: str | None = None,
  ) -> jax.sharding.PartitionSpec:
    """Returns the partition of an activation on the mesh of the context.

    Rows have the lowest priority: they are not split over an axis that another dimension has. A
    dimension whose size the axes do not divide stays whole.

    Args:
      shape: of the activation.
      names: logical axis of every dimension.
      without: a further logical axis whose mesh axes are not for the rows.
    """
    mesh = jax.sharding.get_abstract_mesh()
    taken = set()
    for name in (*names, without):
      if name != "rows":
        taken |= set(self.axes(name))
    entries = []
    for size, name in zip(shape, names, strict=True):
      axes = self.axes(name)
      if name == "rows":
        axes = (DATA, *(axis for axis in axes if axis not in taken))
      axes = tuple(axis for axis in axes if _is_auto(mesh, axis))
      num_parts = math.prod(mesh.shape[axis] for axis in axes)
      is_split = num_parts > 1 and size % num_parts == 0
      entries.append(axes if is_split else None)
    return jax.sharding.PartitionSpec(*entries)

  def constrain(
    self, x: jax.Array, *names: str | None, without: str | None = None
  ) -> jax.Array:
    """Constrains an activation to the partition of `spec`; does nothing on one device.

    Args:
      x: the activation.
      *names: logical axis of every dimension.
      without: a further logical axis whose mesh axes are not for the rows.

    Returns:
      The activation.
    """
    if _num_inner_devices() == 1 or not x.size:
      return x
    spec = self.spec(x.shape, names, without)
    return jax.lax.with_sharding_constraint(x, spec)


TRAIN = Rules.of(
  {
    "embed": ("fsdp",),
    "table": ("fsdp", "tensor"),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "gen_mlp": ("tensor",),
    "rows": ("fsdp",),
  }
)


def _is_auto(mesh: jax.sharding.AbstractMesh, axis: str) -> bool:
  """Returns whether the compiler partitions over an axis of the mesh."""
  axis_types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
  return axis_types.get(axis) == jax.sharding.AxisType.Auto


def _num_inner_devices() -> int:
  """Returns how many devices of a data replica the compiler partitions over."""
  mesh = jax.sharding.get_abstract_mesh()
  axes = [axis for axis in INNER if _is_auto(mesh, axis)]
  return math.prod(mesh.shape[axis] for axis in axes)


def is_partitioned() -> bool:
  """Returns whether the compiler partitions arrays over several devices of the context's mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  axes = [axis for axis in mesh.axis_names if _is_auto(mesh, axis)]
  return math.prod(mesh.shape[axis] for axis in axes) > 1


def by_hand(function: Callable, in_specs, out_specs) -> Callable:
  """Maps a function over the mesh axes that are left to the compiler; unchanged without any.

  Args:
    function: of arrays; a device gets its own part of them.
    in_specs: partitions of the arguments, see `Rules.spec`.
    out_specs: partitions of the results.
  """
  mesh = jax.sharding.get_abstract_mesh()
  axes = {axis for axis in mesh.axis_names if _is_auto(mesh, axis)}
  if not axes:
    return function
  # Not checked: kernels do not say how their results vary over the mesh.
  return jax.shard_map(
    function,
    in_specs=in_specs,
    out_specs=out_specs,
    axis_names=axes,
    check_vma=False,
  )


def over_rows(
  function: Callable, shared: Any, rows: jax.Array, at_once: int
) -> Any:
  """Maps a function over rows: every device of a data replica takes its share, a few at a time.

  Args:
    function: (shared, rows [b, ...]) -> a tree of [b, ...]; rows do not depend on each other.
    shared: a tree that every device has whole.
    rows: [B, ...].
    at_once: rows that a device handles at a time.

  Returns:
    The tree with leaves [B, ...].
  """
  num_rows = rows.shape[0]

  def map_in_blocks(shared: Any, rows: jax.Array) -> Any:
    num_rows = rows.shape[0]
    if num_rows <= at_once:
      return function(shared, rows)
    padded = _with_rows_for(at_once, rows)
    blocks = padded.reshape(-1, at_once, *rows.shape[1:])
    results = jax.lax.map(functools.partial(function, shared), blocks)
    return jax.tree.map(
      lambda x: x.reshape(-1, *x.shape[2:])[:num_rows], results
    )

  num_devices = _num_inner_devices()
  if num_devices == 1:
    return map_in_blocks(shared, rows)
  # Rows are repeated to split evenly; the copies are computed and dropped.
  split = jax.sharding.PartitionSpec(INNER)
  whole = jax.sharding.PartitionSpec()
  on_devices = by_hand(map_in_blocks, (whole, split), split)
  results = on_devices(shared, _with_rows_for(num_devices, rows))
  return jax.tree.map(lambda x: x[:num_rows], results)


def _with_rows_for(divisor: int, rows: jax.Array) -> jax.Array:
  """Repeats the last row until `divisor` divides the number of rows."""
  num_missing = -rows.shape[0] % divisor
  return jnp.concatenate([rows, jnp.repeat(rows[-1:], num_missing, axis=0)])


def parameter_shardings(
  boxed: Any, rules: Rules, mesh: jax.sharding.Mesh
) -> types.Params:
  """Returns the sharding of every parameter.

  Args:
    boxed: abstract parameters with logical axis names, from `jax.eval_shape(module.init, ...)`.
    rules: the mesh axes of the names.
    mesh: the mesh.

  Raises:
    ValueError: a sharded dimension is not divisible by its mesh axes; lists all.
  """
  specs = parameter_specs(boxed, rules)
  problems = []

  def check(path, leaf, spec):
    # A specification may leave out the last dimensions.
    for size, entry in zip(leaf.shape, spec, strict=False):
      # It writes a tuple of one as its member.
      axes = (entry,) if isinstance(entry, str) else entry or ()
      num_parts = math.prod(mesh.shape[axis] for axis in axes)
      if size % num_parts:
        parts = " * ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)
        problems.append(f"{jax.tree_util.keystr(path)}: {size} by {parts}")

  jax.tree_util.tree_map_with_path(check, nn.unbox(boxed), specs)
  if problems:
    raise ValueError(
      "sharded sizes must be divisible by their mesh axis; not so for\n  "
      + "\n  ".join(problems)
    )

  def place(spec: jax.sharding.PartitionSpec) -> jax.sharding.NamedSharding:
    return jax.sharding.NamedSharding(mesh, spec)

  return jax.tree.map(place, specs)


def parameter_specs(boxed: Any, rules: Rules) -> Any:
  """Returns the partition of every parameter, see `parameter_shardings`."""

  def place(names: jax.sharding.PartitionSpec) -> jax.sharding.PartitionSpec:
    entries = [rules.axes(name) or None for name in names]
    return jax.sharding.PartitionSpec(*entries)

  def is_leaf(x: Any) -> bool:
    return isinstance(x, jax.sharding.PartitionSpec)

  return jax.tree.map(place, nn.get_partition_spec(boxed), is_leaf=is_leaf)


def replicated(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  """Returns the sharding of arrays that every device holds whole."""
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def like_parameters(
  tree: Any, shardings: types.Params, mesh: jax.sharding.Mesh
) -> Any:
  """Returns shardings for a tree that holds copies of the parameters (optimizer moments).

  A leaf whose path ends with a parameter's path gets that parameter's sharding, any other leaf is
  replicated.

  Args:
    tree: with dicts in the parameters' shape somewhere inside.
    shardings: of the parameters.
    mesh: the mesh.
  """
  by_path = {}
  for path, parameter_sharding in jax.tree_util.tree_leaves_with_path(
    shardings
  ):
    by_path[tuple(part.key for part in path)] = parameter_sharding
  longest = max(len(path) for path in by_path)

  def find(path, _):
    keys = tuple(
      part.key for part in path if isinstance(part, jax.tree_util.DictKey)
    )
    for length in range(longest, 0, -1):
      if keys[-length:] in by_path:
        return by_path[keys[-length:]]
    return replicated(mesh)

  return jax.tree_util.tree_map_with_path(find, tree)

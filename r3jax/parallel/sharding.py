"""Which mesh axes shard which logical axis, and the shardings that follow.

Parameters and activations name their dimensions; `Rules` say where each goes. Training and rollouts
have rules of their own over the same mesh: training gathers a layer's weights when it needs them,
a rollout must not, for it needs them once per token.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from r3jax import types

DATA = "data"  # the step is mapped over this mesh axis by hand
INNER = ("fsdp", "tensor")  # these are left to the compiler
LOGICAL = ("embed", "table", "vocab", "heads", "kv_heads", "mlp", "rows")


@dataclasses.dataclass(frozen=True)
class Rules:
  """The mesh axes of every logical axis, which may be none.

  Attributes:
    pairs: (logical axis, mesh axes). "rows" are the rows of a batch inside a data replica, "table"
      the width of the token embeddings; the others are dimensions of parameters, and of what they make.
  """

  pairs: tuple[tuple[str, tuple[str, ...]], ...]

  @classmethod
  def of(cls, axes: Mapping[str, tuple[str, ...]]) -> "Rules":
    """Returns rules; an axis that is not named is not sharded.

    Raises:
      ValueError: a logical or mesh axis is unknown.
    """
    unknown = sorted(set(axes) - set(LOGICAL)) + sorted(
      {a for value in axes.values() for a in value} - set(INNER)
    )
    if unknown:
      raise ValueError(
        f"sharding rules must map {LOGICAL} to axes among {INNER}; unknown: {unknown}"
      )
    return cls(tuple((name, tuple(value)) for name, value in axes.items()))

  def axes(self, name: str | None) -> tuple[str, ...]:
    """Returns the mesh axes of a logical axis; none for None."""
    return dict(self.pairs).get(name, ())

  def spec(
    self,
    shape: tuple[int, ...],
    names: tuple[str | None, ...],
    without: str | None = None,
  ) -> jax.sharding.PartitionSpec:
    """Returns where an activation goes on the mesh of the context.

    Rows give way: they are not split over an axis that another dimension has, and a dimension whose
    size the axes do not divide stays whole.

    Args:
      shape: of the activation.
      names: logical axis of every dimension.
      without: a further logical axis whose mesh axes are not for the rows.
    """
    mesh = jax.sharding.get_abstract_mesh()
    taken = {
      axis
      for name in (*names, without)
      if name != "rows"
      for axis in self.axes(name)
    }
    entries = []
    for size, name in zip(shape, names, strict=True):
      wanted = self.axes(name)
      if name == "rows":
        wanted = (DATA, *(axis for axis in wanted if axis not in taken))
      wanted = tuple(axis for axis in wanted if _is_auto(mesh, axis))
      parts = math.prod(mesh.shape[axis] for axis in wanted)
      entries.append(wanted if parts > 1 and size % parts == 0 else None)
    return jax.sharding.PartitionSpec(*entries)

  def constrain(
    self, x: jax.Array, *names: str | None, without: str | None = None
  ) -> jax.Array:
    """Asks the compiler for the sharding that `spec` tells; does nothing where there is one device."""
    mesh = jax.sharding.get_abstract_mesh()
    inner = math.prod(
      mesh.shape[axis] for axis in INNER if _is_auto(mesh, axis)
    )
    if inner == 1 or not x.size:
      return x
    return jax.lax.with_sharding_constraint(
      x, self.spec(x.shape, names, without)
    )


TRAIN = Rules.of(
  {
    "embed": ("fsdp",),
    "table": ("fsdp", "tensor"),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "rows": ("fsdp",),
  }
)


def _is_auto(mesh, axis: str) -> bool:
  """Tells whether the compiler shards over an axis of the mesh."""
  types_ = dict(zip(mesh.axis_names, mesh.axis_types))
  return types_.get(axis) == jax.sharding.AxisType.Auto


def by_hand(function: Callable, in_specs, out_specs) -> Callable:
  """Maps a function over the mesh axes that are left to the compiler; as it is where there are none.

  Args:
    function: of arrays; a device gets its own part of them.
    in_specs, out_specs: how they are split, see `Rules.spec`.
  """
  mesh = jax.sharding.get_abstract_mesh()
  axes = {axis for axis in mesh.axis_names if _is_auto(mesh, axis)}
  if not axes:
    return function
  return jax.shard_map(
    function,
    in_specs=in_specs,
    out_specs=out_specs,
    axis_names=axes,
    check_vma=False,
  )


def over_rows(
  function: Callable, shared, rows: jax.Array, at_once: int
) -> jax.Array:
  """Maps a function over rows: every device of a data replica takes some, a few at a time.

  Args:
    function: (shared, rows [b, ...]) -> [b, ...]; rows do not depend on each other.
    shared: a tree that every device has whole.
    rows: [B, ...].
    at_once: rows that a device handles at a time.
  """

  def some(shared, rows):
    if rows.shape[0] <= at_once:
      return function(shared, rows)
    groups = jnp.concatenate(
      [rows, jnp.repeat(rows[-1:], -rows.shape[0] % at_once, axis=0)]
    )
    found = jax.lax.map(
      functools.partial(function, shared),
      groups.reshape(-1, at_once, *rows.shape[1:]),
    )
    return found.reshape(-1, *found.shape[2:])[: rows.shape[0]]

  mesh, number = jax.sharding.get_abstract_mesh(), rows.shape[0]
  devices = math.prod(
    mesh.shape[axis] for axis in INNER if _is_auto(mesh, axis)
  )
  if devices == 1:
    return some(shared, rows)
  padded = jnp.concatenate(
    [rows, jnp.repeat(rows[-1:], -number % devices, axis=0)]
  )
  split, whole = jax.sharding.PartitionSpec(INNER), jax.sharding.PartitionSpec()
  return by_hand(some, (whole, split), split)(shared, padded)[:number]


def parameter_shardings(
  boxed, rules: Rules, mesh: jax.sharding.Mesh
) -> types.Params:
  """Returns the sharding of every parameter.

  Args:
    boxed: abstract parameters with logical axis names, from `jax.eval_shape(module.init, ...)`.
    rules: where they go.
    mesh: the mesh.

  Raises:
    ValueError: a sharded dimension is not divisible by its mesh axes; lists all.
  """
  specs = parameter_specs(boxed, rules)
  problems = []

  def check(path, leaf, spec):
    for size, axes in zip(leaf.shape, spec):
      # a spec writes a tuple of one as its member
      axes = (axes,) if isinstance(axes, str) else axes or ()
      parts = math.prod(mesh.shape[axis] for axis in axes)
      if size % parts:
        named = " * ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)
        problems.append(f"{jax.tree_util.keystr(path)}: {size} by {named}")

  jax.tree_util.tree_map_with_path(check, nn.unbox(boxed), specs)
  if problems:
    raise ValueError(
      "sharded sizes must be divisible by their mesh axis; not so for\n  "
      + "\n  ".join(problems)
    )
  return jax.tree.map(
    lambda spec: jax.sharding.NamedSharding(mesh, spec), specs
  )


def parameter_specs(boxed, rules: Rules):
  """Returns the partition of every parameter, see `parameter_shardings`."""
  named = nn.get_partition_spec(boxed)
  place = lambda spec: jax.sharding.PartitionSpec(
    *(rules.axes(name) or None for name in spec)
  )
  return jax.tree.map(
    place, named, is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec)
  )


def replicated(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  """Returns the sharding of what every device holds whole."""
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def like_parameters(tree, shardings: types.Params, mesh: jax.sharding.Mesh):
  """Returns shardings for a tree that holds copies of the parameters (optimizer moments).

  A leaf whose path ends with a parameter's path gets that parameter's sharding, any other leaf is
  replicated.
  """
  by_path = {
    tuple(part.key for part in path): sharding
    for path, sharding in jax.tree_util.tree_leaves_with_path(shardings)
  }
  longest = max(len(path) for path in by_path)

  def find(path, _):
    keys = tuple(
      part.key for part in path if isinstance(part, jax.tree_util.DictKey)
    )
    matches = (by_path.get(keys[-n:]) for n in range(longest, 0, -1))
    return next(
      (match for match in matches if match is not None), replicated(mesh)
    )

  return jax.tree_util.tree_map_with_path(find, tree)

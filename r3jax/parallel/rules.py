"""Which mesh axis shards which logical axis, and the shardings that follow."""

import flax.linen as nn
import jax

from r3jax import types

# Logical axis of a parameter -> mesh axis. Axes that are not listed are not sharded.
PARAMETER_RULES = (
    ("embed", "fsdp"),
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("vit_embed", "fsdp"),
    ("vit_heads", "tensor"),
    ("vit_mlp", "tensor"),
)


def parameter_shardings(boxed, mesh: jax.sharding.Mesh) -> types.Params:
  """Returns the sharding of every parameter.

  Args:
    boxed: abstract parameters with logical axis names, from `jax.eval_shape(module.init, ...)`.
    mesh: the mesh.

  Raises:
    ValueError: a sharded dimension is not divisible by its mesh axis; lists all.
  """
  specs = nn.get_partition_spec(boxed)
  shardings = nn.logical_to_mesh_sharding(specs, mesh, PARAMETER_RULES)
  problems = []

  def check(path, leaf, sharding):
    for size, axis in zip(leaf.shape, sharding.spec):
      if axis is not None and size % mesh.shape[axis]:
        problems.append(f"{jax.tree_util.keystr(path)}: {size} by {axis}={mesh.shape[axis]}")

  jax.tree_util.tree_map_with_path(check, nn.unbox(boxed), shardings)
  if problems:
    raise ValueError("sharded sizes must be divisible by their mesh axis; not so for\n  " + "\n  ".join(problems))
  return shardings


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Asks the compiler for a sharding over the mesh axes that are left to it; does nothing without a mesh.

  Args:
    x: any array inside a compiled function.
    *axes: mesh axis of every dimension, or None.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, jax.sharding.PartitionSpec(*axes))


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
    keys = tuple(part.key for part in path if isinstance(part, jax.tree_util.DictKey))
    matches = (by_path.get(keys[-n:]) for n in range(longest, 0, -1))
    return next((match for match in matches if match is not None), replicated(mesh))

  return jax.tree_util.tree_map_with_path(find, tree)

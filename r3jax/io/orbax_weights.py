"""Weights as an Orbax checkpoint: one tree of arrays that any mesh, and plain Orbax, can restore."""

from etils import epath
import jax
import orbax.checkpoint as ocp

from r3jax import types

FOLDER = "weights"  # beside the JSON files and the tokenizer of the model


def save(folder: epath.PathLike, weights: types.Params) -> None:
  """Writes `folder/weights`, whole or not at all.

  Args:
    folder: of the model; is made if missing.
    weights: {'policy', 'vision', 'autoencoder'}, stored in their dtypes.

  Raises:
    ValueError: `folder/weights` is there already.
  """
  path = epath.Path(folder).absolute() / FOLDER
  if path.exists():
    raise ValueError(f"weights are never overwritten; choose another folder or remove {path}")
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(path, weights)


def load(path: epath.PathLike, wanted: types.Params) -> types.Params:
  """Restores a part of a saved tree; a process reads what its devices hold.

  Args:
    path: of the tree: `folder/weights`, or the `state` of a training checkpoint.
    wanted: the subtree to restore, of `jax.ShapeDtypeStruct`s; without a dtype (None) a leaf keeps
      the stored one, without a sharding it is put on the first device.

  Raises:
    ValueError: a leaf is missing or has another shape; lists all.
  """
  path = epath.Path(path).absolute()
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    stored = checkpointer.metadata(path).item_metadata.tree
    _check(path, stored, wanted)
    restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
    arguments = ocp.args.PyTreeRestore(item=wanted, restore_args=restore_args, partial_restore=True)
    return checkpointer.restore(path, args=arguments)


def stored_dtypes(path: epath.PathLike) -> types.Params:
  """Returns the stored tree with every leaf's dtype."""
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    return jax.tree.map(lambda leaf: leaf.dtype, checkpointer.metadata(epath.Path(path).absolute()).item_metadata.tree)


def _check(path: epath.Path, stored: types.Params, wanted: types.Params) -> None:
  problems = []

  def look(keys, leaf):
    found = stored
    for key in keys:
      found = found.get(key.key) if isinstance(found, dict) else None
    name = "/".join(key.key for key in keys)
    if found is None:
      problems.append(f"missing leaf {name}: expected shape {leaf.shape}")
    elif tuple(found.shape) != leaf.shape:
      problems.append(f"mis-shaped leaf {name}: expected shape {leaf.shape}, seen {tuple(found.shape)}")

  jax.tree_util.tree_map_with_path(look, wanted)
  if problems:
    listed = "\n".join(f"  {problem}" for problem in problems)
    raise ValueError(f"the Orbax checkpoint {path} must match the config; {len(problems)} problem(s):\n{listed}")

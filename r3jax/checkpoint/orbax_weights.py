"""Weights as an Orbax checkpoint: one tree of arrays that any mesh, and plain Orbax, can restore."""

from etils import epath
import jax
import orbax.checkpoint as ocp

from r3jax import types
from r3jax.files import paths

FOLDER = "weights"  # beside the JSON files and the tokenizer of the model


def save(folder: epath.PathLike, weights: types.Params) -> None:
  """Writes `folder/weights`, whole or not at all.

  Args:
    folder: of the model; is made if missing, and has no weights.
    weights: {'policy', 'vision', 'autoencoder'}, stored in their dtypes.
  """
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(paths.absolute(folder) / FOLDER, weights)


def load(
  path: epath.PathLike, wanted: types.Params, dtype: types.DType | None
) -> types.Params:
  """Restores a part of a saved tree; a process reads what its devices hold.

  Args:
    path: of the tree: `folder/weights`, or the `state` of a training checkpoint.
    wanted: the subtree to restore, of `jax.ShapeDtypeStruct`s with shardings; their dtypes do not
      matter.
    dtype: of the leaves; None keeps the stored ones.

  Raises:
    ValueError: there is no checkpoint, or a leaf is missing or has another shape; lists all.
  """
  path = paths.absolute(path)
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    stored = checkpointer.metadata(path).item_metadata
    if stored is None:
      raise ValueError(
        f"an Orbax checkpoint of a tree must be at {path}; its metadata is missing"
      )
    found = _matching(path, stored.tree, wanted)
    typed = lambda leaf, there: jax.ShapeDtypeStruct(
      leaf.shape, dtype or there.dtype, sharding=leaf.sharding
    )
    wanted = jax.tree.map(typed, wanted, found)
    restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
    arguments = ocp.args.PyTreeRestore(
      item=wanted, restore_args=restore_args, partial_restore=True
    )
    return checkpointer.restore(path, args=arguments)


def _matching(
  path: epath.Path, stored: types.Params, wanted: types.Params
) -> types.Params:
  """Returns the stored leaves' descriptions in the shape of the wanted tree."""
  problems = []

  def find(keys, leaf):
    found, name = stored, "/".join(key.key for key in keys)
    for key in keys:
      found = found.get(key.key) if isinstance(found, dict) else None
    if found is None:
      problems.append(f"missing leaf {name}: expected shape {leaf.shape}")
    elif tuple(found.shape) != leaf.shape:
      problems.append(
        f"mis-shaped leaf {name}: expected shape {leaf.shape}, seen {tuple(found.shape)}"
      )
    return found

  matching = jax.tree_util.tree_map_with_path(find, wanted)
  if problems:
    listed = "\n".join(f"  {problem}" for problem in problems)
    raise ValueError(
      f"the Orbax checkpoint {path} must match the config; {len(problems)} problem(s):\n{listed}"
    )
  return matching

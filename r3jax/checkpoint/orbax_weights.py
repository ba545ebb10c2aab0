"""Reads and writes weights as an Orbax checkpoint, which any mesh and plain Orbax can restore."""

from collections.abc import Mapping
from typing import Any

from etils import epath
import flax.traverse_util
import jax
import orbax.checkpoint as ocp

from r3jax import types
from r3jax.checkpoint import mismatch
from r3jax.checkpoint import verification
from r3jax.files import paths

FOLDER = "weights"  # beside the JSON files and the tokenizer of the model


def save(folder: epath.PathLike, weights: types.Params) -> None:
  """Writes `folder/weights`, whole or not at all.

  Args:
    folder: Folder of the model; it is made if missing, and has no weights yet.
    weights: {"policy", "vision", "autoencoder"}, stored in their dtypes.
  """
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(paths.absolute(folder) / FOLDER, weights)


def load(
  path: epath.PathLike, wanted: types.Params, dtype: types.DType | None
) -> types.Params:
  """Restores a part of a saved tree; a process reads what its devices hold.

  Args:
    path: Folder of the tree: `folder/weights`, or the `state` of a training checkpoint.
    wanted: Subtree to restore, of `jax.ShapeDtypeStruct`s with shardings; their dtypes do not
      matter.
    dtype: Dtype of the leaves; None keeps the stored ones.

  Raises:
    ValueError: There is no checkpoint, or a leaf is missing or has another shape; lists all.
  """
  path = paths.absolute(path)
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    try:
      metadata = checkpointer.metadata(path).item_metadata
    except verification.DAMAGE as error:
      raise ValueError(_unreadable(path, error)) from error
    if metadata is None:
      raise ValueError(
        f"an Orbax checkpoint of a tree must be at {path}; its metadata is missing"
      )
    stored = flax.traverse_util.flatten_dict(metadata.tree, sep="/")
    named_leaves, structure = jax.tree_util.tree_flatten_with_path(wanted)
    leaves = {
      "/".join(key.key for key in keys): leaf for keys, leaf in named_leaves
    }
    _check_shapes(path, stored, leaves)
    typed = [
      jax.ShapeDtypeStruct(
        leaf.shape, dtype or stored[name].dtype, sharding=leaf.sharding
      )
      for name, leaf in leaves.items()
    ]
    item = jax.tree.unflatten(structure, typed)
    arguments = ocp.args.PyTreeRestore(
      item=item,
      restore_args=ocp.checkpoint_utils.construct_restore_args(item),
      partial_restore=True,
    )
    try:
      return checkpointer.restore(path, args=arguments)
    except verification.DAMAGE as error:
      raise ValueError(_unreadable(path, error)) from error


def _unreadable(path: epath.Path, error: Exception) -> str:
  return (
    f"the Orbax checkpoint {path} cannot be read: {verification.short(error)}"
  )


def _check_shapes(
  path: epath.Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]
) -> None:
  """Raises a ValueError that lists the wanted leaves that are missing or have another shape."""
  wanted_shapes = {name: leaf.shape for name, leaf in wanted.items()}
  stored_shapes = {
    name: tuple(stored[name].shape) for name in wanted if name in stored
  }
  problems = mismatch.missing_or_misshaped("leaf", wanted_shapes, stored_shapes)
  mismatch.refuse(f"the Orbax checkpoint {path}", problems)

"""Keeps traced programs between starts.

JAX's compilation cache spares a second start the compiler's work, but not Python's: tracing and
lowering the step take longer than loading its compiled form. A program that was exported once
(`jax.export`) needs neither.
"""

from collections.abc import Callable
import hashlib
import importlib.metadata
import pathlib
import pickle

from absl import logging
from etils import epath
import jax

from r3jax.files import atomic

_PACKAGE = pathlib.Path(__file__).parents[1]
_TRACED_BY = ("jax", "jaxlib", "flax", "optax")


def _code() -> str:
  """Returns a hash of this package's source and its libraries' versions."""
  parts = [path.read_text() for path in sorted(_PACKAGE.rglob("*.py"))]
  parts += [importlib.metadata.version(name) for name in _TRACED_BY]
  return hashlib.sha256("\0".join(parts).encode()).hexdigest()


_CODE = _code()  # at import: the source may be edited while the program runs


def _key(constants: list[str], arguments) -> str:
  leaves, tree = jax.tree.flatten(arguments)
  described = [
    f"{x.dtype} {x.shape} {getattr(x, 'sharding', None)}" for x in leaves
  ]
  # precision, PRNG, ...
  settings = sorted(
    f"{name}={value}" for name, value in jax.config.values.items()
  )
  parts = [
    _CODE,
    *constants,
    *described,
    *settings,
    str(tree),
    jax.default_backend(),
    str(jax.device_count()),
  ]
  return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _export(function: Callable, arguments):
  """Returns `function` exported over flat leaves, and the structure of its result."""
  tree, out_trees = jax.tree.structure(arguments), []

  def over_leaves(*leaves):
    leaves, out_tree = jax.tree.flatten(
      function(*jax.tree.unflatten(tree, leaves))
    )
    out_trees.append(out_tree)
    return leaves

  # Leaves, for a structure with classes of its own could be stored only if each were registered.
  exported = jax.export.export(jax.jit(over_leaves))(
    *jax.tree.leaves(arguments)
  )
  return exported, out_trees[0]


def _load(path: epath.Path):
  """Returns what `_export` returned when it was written; None where nothing readable is there."""
  if not path.exists():
    return None
  try:
    serialized, out_tree = pickle.loads(path.read_bytes())
  except (pickle.UnpicklingError, EOFError) as error:
    logging.warning(
      "traced program is damaged and will be made anew: %s: %s", path, error
    )
    return None
  logging.info("the step was traced before: %s", path)
  return jax.export.deserialize(bytearray(serialized)), out_tree


def _export_to(path: epath.Path, function: Callable, arguments):
  """Returns what `_export` returns, and writes it; a run needs no place to write it to."""
  exported, out_tree = _export(function, arguments)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = pickle.dumps((bytes(exported.serialize()), out_tree))
    atomic.write_bytes(path, content, shared=True)
  except OSError as error:
    logging.warning("traced program is not kept for the next start: %s", error)
  return exported, out_tree


def load_or_export(
  folder: epath.Path, constants: list[str], function: Callable, arguments: tuple
) -> Callable:
  """Returns `function` without its Python: from the folder if it was exported before, else exported now.

  Args:
    folder: gets one file per program. It holds pickles: only its owner should write there.
    constants: everything that `function` computes with beside its arguments and this package's
      source, as text; a program of other constants is another one.
    function: array pytrees -> array pytree, traceable, without host callbacks.
    arguments: arrays of the shapes, types and shardings that it will be called with.
  """
  path = folder / f"{_key(constants, arguments)}.program"
  exported, out_tree = _load(path) or _export_to(path, function, arguments)
  return lambda *arguments: jax.tree.unflatten(
    out_tree, exported.call(*jax.tree.leaves(arguments))
  )

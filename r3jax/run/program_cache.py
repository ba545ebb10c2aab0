"""Keeps traced programs between starts.

JAX's compilation cache saves a second start the compiler's work, but not Python's: tracing and
lowering the step take longer than loading its compiled form. A program that was exported once
(`jax.export`) needs neither. The fused step, the rounds of evaluation and the stages of
`r3jax.inference` are kept.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import pathlib
import pickle

from absl import logging
from etils import epath
import jax

from r3jax import plugins
from r3jax.files import atomic

_PACKAGE = pathlib.Path(__file__).parents[1]
_TRACED_BY = ("jax", "jaxlib", "flax", "optax")

# A file is the SHA-256 of what follows, and a pickle.
_DIGEST_BYTES = 32

_ONLY_ON_HOST = "a step that calls the host is not kept"

# Keys of the config that cannot reach the rounds of an evaluation, each with the reason. A key that
# is not below one of them makes another program, so that a new key is safe before anyone thinks of
# it.
NOT_EVALUATED: Mapping[str, str] = {
  "total_steps": "the loop counts the iterations",
  "data": "prompts are arguments",
  "checkpoint": "the loop saves",
  "preemption": "the loop ends",
  "health": "the loop watches the metrics",
  "log": "the loop logs",
  "profile": "the loop traces",
}

# The same for the stages of `r3jax.inference`.
NOT_GENERATED: Mapping[str, str] = {
  **NOT_EVALUATED,
  "seed": "random keys are arguments",
  "eval.seed": "random keys are arguments",
  "eval.rounds": "Python counts the rounds",
}

# The same for the traced step.
NOT_TRACED: Mapping[str, str] = {
  **NOT_EVALUATED,
  "seed": "an argument of the step; `reward.shuffle`, which traces it, adds it",
  "eval": "evaluation has programs of its own",
  "reward.endpoints": _ONLY_ON_HOST,
  "reward.token_env": _ONLY_ON_HOST,
  "reward.batch": _ONLY_ON_HOST,
  "reward.image_format": _ONLY_ON_HOST,
  "reward.cache": _ONLY_ON_HOST,
  "reward.client": _ONLY_ON_HOST,
  "reward.judge": _ONLY_ON_HOST,
  "reward.unirl": _ONLY_ON_HOST,
  "reward.max_failed_fraction": "the loop counts missing scores",
  "reward.failure_window": "the loop counts missing scores",
}


@dataclasses.dataclass(frozen=True)
class _Program:
  """An exported function.

  Attributes:
    exported: The function over flat leaves.
    out_tree: Structure of its result.
  """

  exported: jax.export.Exported
  out_tree: jax.tree_util.PyTreeDef


@functools.cache
def code_version() -> str:
  """Returns a hash of this package's source and of the versions of the libraries that trace it.

  It is computed once per process. Call it at the start of a run: the source may be edited while the
  run loads its model, and what it traces then is the source that was imported.
  """
  parts = [path.read_text() for path in sorted(_PACKAGE.rglob("[!.]*.py"))]
  parts += [importlib.metadata.version(name) for name in _TRACED_BY]
  return _hash(parts)


def may_keep(world: str, calls_host: bool) -> bool:
  """Returns whether a traced program may serve later starts.

  Args:
    world: `config.world`.
    calls_host: Whether the program calls back to the host.
  """
  # A program with callbacks to the host cannot be exported. A world of the user's own verifies
  # inside the program, and nothing says whether its source has changed since.
  return not (calls_host or plugins.is_path(world))


def constants(
  config: Mapping,
  model_folder: epath.Path,
  not_traced: Mapping[str, str] = NOT_TRACED,
) -> list[str]:
  """Returns what programs of a config are traced with, beside their arguments and the source.

  Args:
    config: Nested dict of JSON values, `ConfigDict.to_dict()` of the run.
    model_folder: Folder of the model, whose sizes and tokenizer the programs are traced with.
    not_traced: Keys that cannot reach the programs.

  Returns:
    The config without these keys, and the files that describe the model.
  """
  traced = _without(config, not_traced)
  if config["reward"]["shuffle"]:
    traced["seed"] = config["seed"]
  model_files = sorted(
    [*model_folder.glob("[!.]*.json"), *model_folder.glob("[!.]*.txt")]
  )
  return [
    json.dumps(traced, sort_keys=True),
    *(path.read_text() for path in model_files),
  ]


def _without(
  config: Mapping, left_out: Mapping[str, str], prefix: str = ""
) -> dict:
  """Returns a nested dict without some dotted keys and what is below them."""
  kept = {}
  for key, value in config.items():
    path = f"{prefix}{key}"
    if path in left_out:
      continue
    if isinstance(value, Mapping):
      kept[key] = _without(value, left_out, f"{path}.")
    else:
      kept[key] = value
  return kept


def load_or_export(
  folder: epath.Path,
  name: str,
  constants: Sequence[str],
  function: Callable,
  arguments: tuple,
) -> Callable:
  """Returns `function` as an exported program, which runs and compiles without its Python.

  The program is read from the folder if it was exported before, and else exported and written.

  Args:
    folder: Folder with one file per program. The files are pickles: only the folder's owner may
      have the right to write there.
    name: What the log calls the program; another name is another program.
    constants: Texts that identify everything `function` computes with beside its arguments and this
      package's source. Other constants make another program.
    function: Traceable function of array pytrees that returns an array pytree and does not call
      back to the host.
    arguments: Arrays of the shapes, dtypes and shardings that it will be called with.
  """
  path = folder / f"{_key([name, *constants], arguments)}.program"
  program = _read(path)
  if program:
    logging.info("%s was traced before: %s", name, path)
  else:
    program = _export(function, arguments)
    _write(path, program)

  def call(*arguments):
    leaves = program.exported.call(*jax.tree.leaves(arguments))
    return jax.tree.unflatten(program.out_tree, leaves)

  return call


@dataclasses.dataclass(frozen=True)
class Keeper:
  """Keeps the programs of one kind of work in a folder.

  Attributes:
    folder: See `load_or_export`.
    kind: What the log calls them together.
    constants: See `load_or_export`.
  """

  folder: epath.Path
  kind: str
  constants: Sequence[str]

  def __call__(
    self, name: str, function: Callable, arguments: tuple
  ) -> Callable:
    """Returns a function that is not traced again, see `load_or_export`.

    Args:
      name: Of the program among those of its kind.
      function: See `load_or_export`.
      arguments: See `load_or_export`.
    """
    return load_or_export(
      self.folder, f"{name} of {self.kind}", self.constants, function, arguments
    )


def _key(constants: Sequence[str], arguments: tuple) -> str:
  """Returns a hash of everything that the traced program depends on."""
  leaves, tree = jax.tree.flatten(arguments)
  signature = [
    f"{leaf.dtype} {leaf.shape} {getattr(leaf, 'sharding', None)}"
    for leaf in leaves
  ]
  # Precision, PRNG implementation, ...
  jax_settings = sorted(
    f"{name}={value}" for name, value in jax.config.values.items()
  )
  return _hash(
    [
      code_version(),
      *constants,
      *signature,
      *jax_settings,
      str(tree),
      jax.default_backend(),
      str(jax.device_count()),
    ]
  )


def _hash(parts: Sequence[str]) -> str:
  return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _export(function: Callable, arguments: tuple) -> _Program:
  """Traces and exports a function over the leaves of its arguments and result."""
  tree = jax.tree.structure(arguments)
  out_tree = None

  # Over leaves, because an exported pytree of our own classes would need each of them registered.
  def over_leaves(*leaves):
    nonlocal out_tree
    result = function(*jax.tree.unflatten(tree, leaves))
    out_leaves, out_tree = jax.tree.flatten(result)
    return out_leaves

  exported = jax.export.export(jax.jit(over_leaves))(
    *jax.tree.leaves(arguments)
  )
  return _Program(exported, out_tree)


def _read(path: epath.Path) -> _Program | None:
  """Returns the program of a file; None if the file is missing or damaged."""
  if not path.exists():
    return None
  try:
    content = path.read_bytes()
  except OSError as error:
    logging.warning(
      "traced program cannot be read and is made anew: %s: %s", path, error
    )
    return None
  digest = content[:_DIGEST_BYTES]
  pickled = content[_DIGEST_BYTES:]
  # What a damaged pickle raises, or builds, is not foreseeable.
  if hashlib.sha256(pickled).digest() != digest:
    logging.warning("traced program is damaged and is made anew: %s", path)
    return None
  serialized, out_tree = pickle.loads(pickled)
  exported = jax.export.deserialize(bytearray(serialized))
  return _Program(exported, out_tree)


def _write(path: epath.Path, program: _Program) -> None:
  """Writes a program; a folder that cannot be written is no error."""
  serialized = bytes(program.exported.serialize())
  pickled = pickle.dumps((serialized, program.out_tree))
  content = hashlib.sha256(pickled).digest() + pickled
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    # The processes of a run export the same program at the same time.
    atomic.write_bytes(path, content, shared=True)
  except OSError as error:
    logging.warning("traced program is not kept for the next start: %s", error)

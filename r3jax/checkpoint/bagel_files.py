"""BAGEL's released files <-> the weights of r3jax, tensor by tensor.

`bagel_table` says where every released tensor lives in the tree. Reading a sharded model, a process
holds what its devices hold of one leaf at a time, and one tensor; writing, it holds two copies of
one tensor beside the tree.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
import functools
import itertools
import json
import math

from etils import epath
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from r3jax import types
from r3jax.checkpoint import bagel_config
from r3jax.checkpoint import bagel_names
from r3jax.checkpoint import safetensors_files
from r3jax.model import architecture
from r3jax.model import layers

Shape = tuple[int, ...]
Progress = Callable[[float], None]
# start and stop in every axis: a piece of a leaf
Spans = tuple[tuple[int, int], ...]

# the first that exists is read
MODEL_FILES = ("ema.safetensors", "model.safetensors")
# or, without them, the files that this one names
INDEX_FILE = "model.safetensors.index.json"
AUTOENCODER_FILES = ("ae.safetensors",)
# bytes; what XLA's CPU devices ask of memory that they take over
_ALIGNMENT = 64


def _differences(
  kind: str, expected: dict[str, Shape], seen: dict[str, Shape]
) -> Iterator[str]:
  for name, shape in expected.items():
    if name not in seen:
      yield f"missing {kind} {name}: expected shape {shape}"
    elif seen[name] != shape:
      yield f"mis-shaped {kind} {name}: expected shape {shape}, seen {seen[name]}"
  for name in seen.keys() - expected.keys():
    yield f"unexpected {kind} {name}: seen shape {seen[name]}"


def _refuse(what: str, problems: list[str]) -> None:
  if problems:
    listed = "\n".join(f"  {problem}" for problem in problems)
    raise ValueError(
      f"{what} must match the config; {len(problems)} problem(s):\n{listed}"
    )


# --- Finding and checking ----------------------------------------------------------------------


def _headers(
  paths: Iterable[epath.Path],
) -> tuple[dict[str, safetensors_files.Entry], list[str]]:
  """Returns the tensors of files and what is wrong with the files."""
  entries, problems = {}, []
  for path in paths:
    try:
      header = safetensors_files.read_header(path)
    except ValueError as error:
      problems.append(str(error))
      continue
    problems += _twice(entries, header)
    entries |= header
  return entries, problems


def _twice(
  first: dict[str, safetensors_files.Entry],
  second: dict[str, safetensors_files.Entry],
) -> list[str]:
  return [
    f"tensor {name} must be in one file; it is in {first[name].path.name} and in {second[name].path.name}"
    for name in sorted(first.keys() & second.keys())
  ]


def _indexed(
  index: epath.Path,
) -> tuple[dict[str, safetensors_files.Entry], list[str]]:
  """Returns the tensors of the files that an index names, and all that contradicts it."""
  try:
    named = json.loads(index.read_text())["weight_map"]
    files = sorted(set(named.values()))
  except (
    UnicodeDecodeError,
    json.JSONDecodeError,
    KeyError,
    TypeError,
    AttributeError,
  ) as error:
    return {}, [
      f"unreadable file {index}: it must be JSON with a weight_map: {error!r}"
    ]
  missing = [name for name in files if not (index.parent / name).is_file()]
  entries, problems = _headers(
    index.parent / name for name in files if name not in missing
  )
  problems += [
    f"missing file {name}: {index.name} names it" for name in missing
  ]
  problems += [
    f"tensor {name} must be in {file}, as {index.name} says"
    for name, file in sorted(named.items())
    if file not in missing
    and (name not in entries or entries[name].path.name != file)
  ]
  problems += [
    f"tensor {name} must be in {index.name}"
    for name in sorted(entries.keys() - named.keys())
  ]
  return entries, problems


def _found(
  folder: epath.Path,
) -> tuple[dict[str, safetensors_files.Entry], list[str]]:
  """Returns all tensors of a folder, and what is wrong with its files."""
  first = lambda names: next(
    (folder / name for name in names if (folder / name).is_file()), None
  )
  model, autoencoder = first(MODEL_FILES), first(AUTOENCODER_FILES)
  if model is None and (folder / INDEX_FILE).is_file():
    entries, problems = _indexed(folder / INDEX_FILE)
    model = folder / INDEX_FILE
  else:
    entries, problems = _headers([model] if model else [])
  more, more_problems = _headers([autoencoder] if autoencoder else [])
  wanted = {
    f"{' or '.join(MODEL_FILES)} or {INDEX_FILE}": model,
    AUTOENCODER_FILES[0]: autoencoder,
  }
  missing = [
    f"missing file {names}" for names, path in wanted.items() if path is None
  ]
  return entries | more, missing + problems + more_problems + _twice(
    entries, more
  )


def find(
  folder: epath.PathLike, config: architecture.BagelConfig
) -> dict[str, safetensors_files.Entry]:
  """Returns every tensor of a model by its released name; reads headers only.

  Args:
    folder: see `load`.
    config: the sizes that the model must have.

  Raises:
    ValueError: lists everything that is missing, unexpected, mis-shaped or unreadable.
  """
  folder = epath.Path(folder)
  if not folder.is_dir():
    raise ValueError(f"a BAGEL folder must be a folder; not found: {folder}")
  entries, problems = _found(folder)
  # what a broken file holds cannot be told from what is missing
  if not problems:
    expected = bagel_names.expected_shapes(config)
    tables = (bagel_names.LATENT_TABLE, bagel_names.VISION_TABLE)
    entries = {
      name: entry for name, entry in entries.items() if name not in tables
    }
    problems = sorted(
      _differences(
        "tensor",
        expected,
        {name: entry.shape for name, entry in entries.items()},
      )
    )
    problems += [
      f"wrong dtype of tensor {name}: expected one of {', '.join(safetensors_files.DTYPES)}, seen {entry.dtype}"
      for name, entry in sorted(entries.items())
      if name in expected and entry.dtype not in safetensors_files.DTYPES
    ]
  _refuse(f"the BAGEL folder {folder}", problems)
  return entries


# --- Reading -----------------------------------------------------------------------------------


def _num_layers(config: architecture.BagelConfig) -> dict[str, int]:
  return {"policy": config.llm.num_layers, "vision": config.vision.num_layers}


def leaf_shapes(config: architecture.BagelConfig) -> dict[str, Shape]:
  """Returns the shape of every leaf of the weights by its path, joined by "/"."""
  return {
    tensor.path: _leaf_shape(tensor, _num_layers(config))
    for tensor in bagel_names.table(config)
  }


def _leaf_shape(
  tensor: bagel_names.Tensor, num_layers: dict[str, int]
) -> Shape:
  if tensor.layer is None:
    return tensor.shape
  return (num_layers[tensor.path.split("/")[0]], *tensor.shape)


def _rows(tensor: bagel_names.Tensor, spans: Spans) -> tuple[int, int] | None:
  """Returns the part that a piece needs of the tree's axis that is the slowest in the file, if any."""
  if tensor.layer is not None:
    (first, last), *spans = spans
    if not first <= tensor.layer < last:
      return None
  return spans[tensor.layout[0][0]]


def _read(
  tensor: bagel_names.Tensor,
  entry: safetensors_files.Entry,
  start: int,
  stop: int,
) -> np.ndarray:
  """Reads a part of the slowest axis of a tensor, in the tree's layout."""
  axis = tensor.layout[0][0]
  inner = math.prod(tensor.shape[i] for i in tensor.layout[0][1:])
  return tensor.to_tree(
    safetensors_files.read(entry, slice(start * inner, stop * inner)),
    {axis: stop - start},
  )


def _pieces(
  tensors: list[bagel_names.Tensor], entries, spans: Collection[Spans], dtype
) -> dict[Spans, np.ndarray]:
  """Returns pieces of a leaf; every tensor is read once, as far as the pieces together need it."""
  pieces = {
    one: _aligned([stop - start for start, stop in one], dtype) for one in spans
  }
  for tensor in tensors:
    needed = {one: rows for one in pieces if (rows := _rows(tensor, one))}
    if not needed:
      continue
    start = min(first for first, _ in needed.values())
    found = _read(
      tensor,
      entries[tensor.name],
      start,
      max(last for _, last in needed.values()),
    )
    for one in needed:
      piece, inside = pieces[one], list(one)
      if tensor.layer is not None:
        piece, inside = piece[tensor.layer - one[0][0]], inside[1:]
      axis = tensor.layout[0][0]
      inside[axis] = (inside[axis][0] - start, inside[axis][1] - start)
      piece[...] = found[tuple(slice(*span) for span in inside)]
  return pieces


def _aligned(shape: Collection[int], dtype) -> np.ndarray:
  """Returns an empty array that a CPU device can take over without a copy."""
  size = math.prod(shape) * np.dtype(dtype).itemsize
  memory = np.empty(size + _ALIGNMENT, np.uint8)
  offset = -memory.ctypes.data % _ALIGNMENT
  return memory[offset : offset + size].view(dtype).reshape(shape)


def _placed(
  tensors, entries, shape: Shape, dtype, sharding: jax.sharding.Sharding
) -> jax.Array:
  """Reads one leaf onto this process's devices."""
  holders: dict[Spans, list] = {}
  for device, index in sharding.addressable_devices_indices_map(shape).items():
    spans = tuple(part.indices(size)[:2] for part, size in zip(index, shape))
    holders.setdefault(spans, []).append(device)
  arrays, pieces = [], _pieces(tensors, entries, holders, dtype)
  for spans, devices in holders.items():
    piece = pieces.pop(spans)
    arrays += jax.block_until_ready(
      [jax.device_put(piece, device, may_alias=True) for device in devices]
    )
  return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def load(
  folder: epath.PathLike,
  config: architecture.BagelConfig,
  shardings: Mapping[str, jax.sharding.Sharding] | None = None,
  dtype: np.typing.DTypeLike | None = np.float32,
  progress: Progress = lambda read: None,
) -> types.Params:
  """Reads a model in BAGEL's format; headers are checked before any tensor is read.

  Sin-cos tables in the files are ignored (`layers.sincos_table` recomputes them).

  Args:
    folder: holds `ema.safetensors` (or `model.safetensors`, or `model.safetensors.index.json` and
      the files it names) and `ae.safetensors`; F32, F16 or BF16. May be in a bucket (gs://).
    config: the sizes that the model must have.
    shardings: of the leaves to read by their paths ("policy/lm_head/kernel", see `leaf_shapes`).
      Of every tensor this process reads the rows (of the file's first axis) that its devices
      need, once; one leaf at a time is on its way. None: reads all leaves to the host.
    dtype: of the leaves; None keeps the stored ones.
    progress: called after every leaf with the share that has been read, up to 1.

  Returns:
    {'policy', 'vision', 'autoencoder'}: nested dicts of jax arrays, or of numpy arrays.

  Raises:
    ValueError: lists everything that is missing, unexpected, mis-shaped or unreadable.
  """
  entries, shapes = find(folder, config), leaf_shapes(config)
  tensors: dict[str, list[bagel_names.Tensor]] = {}
  for tensor in bagel_names.table(config):
    tensors.setdefault(tensor.path, []).append(tensor)
  wanted = sorted(
    tensors if shardings is None else shardings,
    key=lambda path: -math.prod(shapes[path]),
  )
  total, leaves = sum(math.prod(shapes[path]) for path in wanted), {}
  for path in wanted:  # the largest first, while there is most memory
    parts = tensors[path], entries
    kept = functools.reduce(
      jnp.promote_types,
      {entries[tensor.name].numpy_dtype for tensor in tensors[path]},
    )
    leaf_dtype = kept if dtype is None else dtype
    if shardings is None:
      whole = tuple((0, size) for size in shapes[path])
      leaves[path] = _pieces(*parts, [whole], leaf_dtype)[whole]
    else:
      leaves[path] = _placed(*parts, shapes[path], leaf_dtype, shardings[path])
    progress(sum(math.prod(shapes[path]) for path in leaves) / total)
  return flax.traverse_util.unflatten_dict(leaves, sep="/")


# --- Writing -----------------------------------------------------------------------------------


def _split(
  config: architecture.BagelConfig,
) -> tuple[list[bagel_names.Tensor], list[bagel_names.Tensor]]:
  """Returns the tensors of the model's and of the autoencoder's file."""
  model, autoencoder = [], []
  for tensor in bagel_names.table(config):
    (autoencoder if tensor.path.startswith("autoencoder/") else model).append(
      tensor
    )
  return model, autoencoder


def _stored_dtypes(
  leaves: Mapping[str, np.ndarray], dtype: np.typing.DTypeLike | None
) -> dict[str, np.dtype]:
  known = [np.dtype(one) for one in safetensors_files.DTYPES.values()]
  stored = {
    path: np.dtype(dtype or leaf.dtype) for path, leaf in leaves.items()
  }
  for path, one in stored.items():
    if one not in known:
      raise ValueError(
        f"dtype must be float32, float16 or bfloat16; got {one} for {path}"
      )
  return stored


def save(
  weights: types.Params,
  config: architecture.BagelConfig,
  folder: epath.PathLike,
  dtype: np.typing.DTypeLike | None = np.float32,
  progress: Progress = lambda written: None,
) -> None:
  """Writes a model in BAGEL's format: both safetensors files and the three JSON configs.

  `load` gives the same numbers back, rounded to the dtype. The sin-cos tables are written too:
  other programs look for them.

  Args:
    weights: {'policy', 'vision', 'autoencoder'}: nested dicts of arrays (not boxed).
    config: the sizes of the model.
    folder: is made if missing; files in it are replaced.
    dtype: of all tensors; float32, float16 or bfloat16. None keeps every leaf's; the sin-cos
      tables then have that of the token embedding.
    progress: called after every tensor with the share that has been written, up to 1.

  Raises:
    ValueError: the dtype is another one, or the weights are not those of the config (lists all).
  """
  leaves = flax.traverse_util.flatten_dict(weights, sep="/")
  seen = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
  _refuse(
    "the weights", sorted(_differences("leaf", leaf_shapes(config), seen))
  )
  stored = _stored_dtypes(leaves, dtype)
  folder = epath.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  total, written = sum(leaf.size for leaf in leaves.values()), 0

  def released(tensors: list[bagel_names.Tensor]) -> Iterator[np.ndarray]:
    nonlocal written
    for tensor in tensors:
      leaf = leaves[tensor.path]
      yield tensor.to_released(
        np.asarray(leaf if tensor.layer is None else leaf[tensor.layer])
      )
      written += math.prod(tensor.shape)
      progress(written / total)

  model, autoencoder = _split(config)
  fixed = bagel_names.fixed_tables(config)
  specs = {t.name: (t.released_shape, stored[t.path]) for t in model}
  specs |= {
    name: ((side**2, width), stored["policy/embed_tokens/embedding"])
    for name, (width, side) in fixed.items()
  }
  tables = (layers.sincos_table(width, side) for width, side in fixed.values())
  safetensors_files.write(
    folder / MODEL_FILES[0], specs, itertools.chain(released(model), tables)
  )
  specs = {t.name: (t.released_shape, stored[t.path]) for t in autoencoder}
  safetensors_files.write(
    folder / AUTOENCODER_FILES[0], specs, released(autoencoder)
  )
  save_configs(config, folder)


def save_configs(
  config: architecture.BagelConfig, folder: epath.PathLike
) -> None:
  """Writes the JSON files that say the sizes of a model; the folder is there."""
  for name, content in bagel_config.to_json(config).items():
    (epath.Path(folder) / name).write_text(json.dumps(content, indent=1) + "\n")

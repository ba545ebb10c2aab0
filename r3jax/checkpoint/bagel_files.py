"""Reads and writes weights as BAGEL's released files, tensor by tensor.

`bagel_names` says where every released tensor lives in the tree. A process that reads a sharded
model holds what its devices hold of one leaf, and one tensor; one that writes holds two copies of
one tensor beside the tree.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
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
from r3jax.checkpoint import bagel_headers
from r3jax.checkpoint import bagel_names
from r3jax.checkpoint import mismatch
from r3jax.checkpoint import safetensors_files
from r3jax.model import architecture
from r3jax.model import layers

Shape = tuple[int, ...]
# Called with the share that has been read or written, up to 1.
Progress = Callable[[float], None]
# A piece of an array: (start, stop) in every axis.
Spans = tuple[tuple[int, int], ...]

_ALIGNMENT = 64  # bytes: XLA's CPU devices take over memory that is aligned so


def no_progress(share: float) -> None:
  """Reports nothing."""
  del share


def leaf_shapes(config: architecture.BagelConfig) -> dict[str, Shape]:
  """Returns the shape of every leaf of the weights by its path, joined by "/"."""
  num_layers = {
    "policy": config.llm.num_layers,
    "vision": config.vision.num_layers,
  }
  shapes = {}
  for tensor in bagel_names.table(config):
    shape = tensor.shape
    if tensor.layer is not None:
      part = tensor.path.split("/")[0]
      shape = (num_layers[part], *shape)
    shapes[tensor.path] = shape
  return shapes


# --- Reading -----------------------------------------------------------------------------------


def load(
  folder: epath.PathLike,
  config: architecture.BagelConfig,
  shardings: Mapping[str, jax.sharding.Sharding] | None = None,
  dtype: np.typing.DTypeLike | None = np.float32,
  progress: Progress = no_progress,
) -> types.Params:
  """Reads a model in BAGEL's format; headers are checked before any tensor is read.

  Sin-cos tables in the files are ignored (`layers.sincos_table` recomputes them).

  Args:
    folder: Folder with `ema.safetensors` (or `model.safetensors`, or `model.safetensors.index.json`
      and the files it names) and `ae.safetensors`, in F32, F16 or BF16. May be in a bucket (gs://).
    config: Sizes that the model must have.
    shardings: Sharding of every leaf to read by its path ("policy/lm_head/kernel", see
      `leaf_shapes`). This process reads the rows of every tensor (along the file's first axis) that
      its devices need, once, and one leaf at a time. None reads all leaves to the host.
    dtype: Dtype of the leaves; None keeps the stored ones.
    progress: Called after every leaf with the share that has been read.

  Returns:
    {"policy", "vision", "autoencoder"}: nested dicts of jax arrays, or of numpy arrays where
    `shardings` is None.

  Raises:
    ValueError: Lists everything that is missing, unexpected, mis-shaped or unreadable.
  """
  entries = bagel_headers.find(folder, config)
  shapes = leaf_shapes(config)
  sizes = {path: math.prod(shape) for path, shape in shapes.items()}
  tensors_of_leaf: dict[str, list[bagel_names.Tensor]] = {}
  for tensor in bagel_names.table(config):
    tensors_of_leaf.setdefault(tensor.path, []).append(tensor)

  # The largest first, while there is most memory.
  paths = sorted(
    shapes if shardings is None else shardings, key=lambda path: -sizes[path]
  )
  total_size = sum(sizes[path] for path in paths)
  read_size = 0
  leaves = {}
  for path in paths:
    tensors = tensors_of_leaf[path]
    leaf_dtype = _stored_dtype(tensors, entries) if dtype is None else dtype
    if shardings is None:
      whole = tuple((0, size) for size in shapes[path])
      leaves[path] = _read_pieces(tensors, entries, [whole], leaf_dtype)[whole]
    else:
      leaves[path] = _read_sharded(
        tensors, entries, shapes[path], leaf_dtype, shardings[path]
      )
    read_size += sizes[path]
    progress(read_size / total_size)
  return flax.traverse_util.unflatten_dict(leaves, sep="/")


def _stored_dtype(
  tensors: list[bagel_names.Tensor],
  entries: Mapping[str, safetensors_files.Entry],
) -> np.dtype:
  """Returns the dtype that holds all tensors of a leaf as they are stored."""
  dtypes = [entries[tensor.name].numpy_dtype for tensor in tensors]
  return functools.reduce(jnp.promote_types, dtypes)


def _read_sharded(
  tensors: list[bagel_names.Tensor],
  entries: Mapping[str, safetensors_files.Entry],
  shape: Shape,
  dtype: np.typing.DTypeLike,
  sharding: jax.sharding.Sharding,
) -> jax.Array:
  """Reads one leaf onto this process's devices."""
  devices_of_piece: dict[Spans, list[jax.Device]] = {}
  for device, index in sharding.addressable_devices_indices_map(shape).items():
    spans = tuple(
      part.indices(size)[:2] for part, size in zip(index, shape, strict=True)
    )
    devices_of_piece.setdefault(spans, []).append(device)

  pieces = _read_pieces(tensors, entries, devices_of_piece, dtype)
  arrays = []
  for spans, devices in devices_of_piece.items():
    # Out of the dict, so that its memory is free once the devices have it.
    piece = pieces.pop(spans)
    copies = [
      jax.device_put(piece, device, may_alias=True) for device in devices
    ]
    arrays += jax.block_until_ready(copies)
  return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _read_pieces(
  tensors: list[bagel_names.Tensor],
  entries: Mapping[str, safetensors_files.Entry],
  pieces: Collection[Spans],
  dtype: np.typing.DTypeLike,
) -> dict[Spans, np.ndarray]:
  """Reads pieces of a leaf; a tensor is read once, as far as the pieces together need it.

  Args:
    tensors: Tensors of the leaf: one, or one per layer.
    entries: Where every tensor is stored, by its released name.
    pieces: Spans of the pieces.
    dtype: Dtype of the leaf.
  """
  arrays = {}
  for spans in pieces:
    shape = [stop - start for start, stop in spans]
    arrays[spans] = _aligned_empty(shape, dtype)
  for tensor in tensors:
    rows_of_piece = {}
    for spans in arrays:
      rows = _rows(tensor, spans)
      if rows is not None:
        rows_of_piece[spans] = rows
    if not rows_of_piece:
      continue
    start = min(first for first, _ in rows_of_piece.values())
    stop = max(last for _, last in rows_of_piece.values())
    part = _read_rows(tensor, entries[tensor.name], start, stop)
    for spans in rows_of_piece:
      _copy_into(arrays[spans], spans, tensor, part, start)
  return arrays


def _aligned_empty(
  shape: Collection[int], dtype: np.typing.DTypeLike
) -> np.ndarray:
  """Returns an empty array that a CPU device can take over without a copy."""
  num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
  memory = np.empty(num_bytes + _ALIGNMENT, np.uint8)
  offset = -memory.ctypes.data % _ALIGNMENT
  return memory[offset : offset + num_bytes].view(dtype).reshape(shape)


def _slowest_axis(tensor: bagel_names.Tensor) -> int:
  """Returns the tree's axis (without the layers) that is the slowest in the file."""
  return tensor.layout[0][0]


def _rows(tensor: bagel_names.Tensor, spans: Spans) -> tuple[int, int] | None:
  """Returns the (start, stop) of the slowest axis that a piece needs; None if it needs nothing."""
  if tensor.layer is not None:
    first_layer, last_layer = spans[0]
    if not first_layer <= tensor.layer < last_layer:
      return None
    spans = spans[1:]
  return spans[_slowest_axis(tensor)]


def _read_rows(
  tensor: bagel_names.Tensor,
  entry: safetensors_files.Entry,
  start: int,
  stop: int,
) -> np.ndarray:
  """Reads a part of the slowest axis of a tensor, in the tree's layout."""
  # The first axis in the file may be a product: [heads * head dim] for [heads, head dim].
  inner_size = math.prod(tensor.shape[axis] for axis in tensor.layout[0][1:])
  stored = safetensors_files.read(
    entry, slice(start * inner_size, stop * inner_size)
  )
  return tensor.to_tree(stored, {_slowest_axis(tensor): stop - start})


def _copy_into(
  piece: np.ndarray,
  spans: Spans,
  tensor: bagel_names.Tensor,
  part: np.ndarray,
  start: int,
) -> None:
  """Copies what a piece needs out of a part of a tensor.

  Args:
    piece: Array to fill.
    spans: Its place in the leaf.
    tensor: Tensor that the part is of.
    part: Part of the slowest axis of the tensor, in the tree's layout.
    start: Where the part begins in that axis.
  """
  if tensor.layer is not None:
    first_layer = spans[0][0]
    piece = piece[tensor.layer - first_layer]
    spans = spans[1:]
  inside = list(spans)
  axis = _slowest_axis(tensor)
  first, last = spans[axis]
  inside[axis] = (first - start, last - start)
  piece[...] = part[tuple(slice(*span) for span in inside)]


# --- Writing -----------------------------------------------------------------------------------


def save(
  weights: types.Params,
  config: architecture.BagelConfig,
  folder: epath.PathLike,
  dtype: np.typing.DTypeLike | None = np.float32,
  progress: Progress = no_progress,
) -> None:
  """Writes a model in BAGEL's format: both safetensors files and the three JSON configs.

  `load` gives the same numbers back, rounded to the dtype. The sin-cos tables are written too,
  because other programs look for them.

  Args:
    weights: {"policy", "vision", "autoencoder"}: nested dicts of arrays (not boxed).
    config: Sizes of the model.
    folder: Folder to write; it is made if missing, and files in it are replaced.
    dtype: Dtype of all tensors: float32, float16 or bfloat16. None keeps every leaf's; the sin-cos
      tables then have that of the token embedding.
    progress: Called after every tensor with the share that has been written.

  Raises:
    ValueError: The dtype is another one, or the weights are not those of the config (lists all).
  """
  leaves = flax.traverse_util.flatten_dict(weights, sep="/")
  shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
  mismatch.refuse(
    "the weights", mismatch.differences("leaf", leaf_shapes(config), shapes)
  )
  dtypes = _dtypes_to_store(leaves, dtype)
  folder = epath.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  total_size = sum(leaf.size for leaf in leaves.values())
  written_size = 0

  def released(tensors: list[bagel_names.Tensor]) -> Iterator[np.ndarray]:
    """Yields the tensors in the released layout, one at a time."""
    nonlocal written_size
    for tensor in tensors:
      leaf = leaves[tensor.path]
      if tensor.layer is not None:
        leaf = leaf[tensor.layer]
      yield tensor.to_released(np.asarray(leaf))
      written_size += math.prod(tensor.shape)
      progress(written_size / total_size)

  model = []
  autoencoder = []
  for tensor in bagel_names.table(config):
    in_autoencoder = tensor.path.startswith("autoencoder/")
    (autoencoder if in_autoencoder else model).append(tensor)

  # name -> (shape, dtype), in the order of the arrays
  specs = {t.name: (t.released_shape, dtypes[t.path]) for t in model}
  fixed_tables = bagel_names.fixed_tables(config)
  for name, (width, side) in fixed_tables.items():
    specs[name] = ((side**2, width), dtypes["policy/embed_tokens/embedding"])
  sincos_tables = (
    layers.sincos_table(width, side) for width, side in fixed_tables.values()
  )
  safetensors_files.write(
    folder / bagel_headers.MODEL_FILES[0],
    specs,
    itertools.chain(released(model), sincos_tables),
  )

  specs = {t.name: (t.released_shape, dtypes[t.path]) for t in autoencoder}
  safetensors_files.write(
    folder / bagel_headers.AUTOENCODER_FILE, specs, released(autoencoder)
  )
  save_configs(config, folder)


def _dtypes_to_store(
  leaves: Mapping[str, np.ndarray], dtype: np.typing.DTypeLike | None
) -> dict[str, np.dtype]:
  """Returns the dtype to store every leaf in, by its path."""
  storable = [np.dtype(known) for known in safetensors_files.DTYPES.values()]
  dtypes = {}
  for path, leaf in leaves.items():
    leaf_dtype = np.dtype(dtype or leaf.dtype)
    if leaf_dtype not in storable:
      raise ValueError(
        f"dtype must be float32, float16 or bfloat16; got {leaf_dtype} for {path}"
      )
    dtypes[path] = leaf_dtype
  return dtypes


def save_configs(
  config: architecture.BagelConfig, folder: epath.PathLike
) -> None:
  """Writes the JSON files with the sizes of a model into an existing folder."""
  for name, content in bagel_config.to_json(config).items():
    text = json.dumps(content, indent=1) + "\n"
    (epath.Path(folder) / name).write_text(text)

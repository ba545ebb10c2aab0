"""Reads safetensors files by seeking and writes them tensor by tensor, on disks and in buckets.

The safetensors library maps files of the local disk only. Here a tensor, or some of its rows, is
one ranged read of an `epath.Path`. The tests compare both, bit by bit.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import io
import json
import math
from typing import IO

from etils import epath
import ml_dtypes
import numpy as np

from r3jax.files import atomic
from r3jax.files import bounded

Shape = tuple[int, ...]

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
# A tensor takes some 150 bytes and 8 values; the released model has 1,300 of them.
_HEADER_LIMITS = bounded.Limits(
  max_bytes=100_000_000, max_levels=3, max_values=5_000_000
)
_MAX_AXES = 8
_MAX_SIZE = 2**48
_LENGTH_BYTES = 8  # The file starts with the length of the header.


@dataclasses.dataclass(frozen=True)
class Entry:
  """One tensor in a file.

  Attributes:
    path: File that has the tensor.
    dtype: Name of its dtype in the file; only those of `DTYPES` can be read.
    shape: Shape of the tensor.
    start: Number of its first byte in the file.
    stop: Number of the byte behind its last one.
  """

  path: epath.Path
  dtype: str
  shape: Shape
  start: int
  stop: int

  @property
  def numpy_dtype(self) -> np.dtype:
    """Dtype of the arrays that `read` returns."""
    return np.dtype(DTYPES[self.dtype])


def read_header(path: epath.PathLike) -> dict[str, Entry]:
  """Returns the tensors of a file by name; reads no tensor.

  Raises:
    ValueError: The file is truncated, or is not a safetensors file.
  """
  path = epath.Path(path)
  bounded.check_link(path)
  with bounded.open_file(path) as file:
    size = file_size(file)
    file.seek(0)
    length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    if not 0 < length <= min(size - _LENGTH_BYTES, _HEADER_LIMITS.max_bytes):
      raise ValueError(
        f"unreadable file {path}: {size} bytes hold no header of {length}"
      )
    text = file.read(length)
  first_byte = _LENGTH_BYTES + length
  entries = {}
  try:
    header = bounded.parse_json(text, _HEADER_LIMITS)
    if not isinstance(header, dict):
      raise ValueError(f"it is a {type(header).__name__}")
    header.pop("__metadata__", None)
    for name, fields in header.items():
      entries[name] = _read_entry(path, name, fields, first_byte)
  except ValueError as error:
    raise ValueError(
      f"unreadable file {path}: its header is none of safetensors: {error}"
    ) from error
  _check_bytes(entries, first_byte, size, path)
  return entries


def _read_entry(
  path: epath.Path, name: str, fields: object, first_byte: int
) -> Entry:
  """Returns the tensor of an entry of a header; raises a ValueError where it is none.

  Args:
    path: File that has the header.
    name: Name of the tensor.
    fields: JSON value of the entry.
    first_byte: Number of the first byte behind the header, from which offsets count.
  """
  shape = offsets = dtype = None
  if isinstance(fields, dict):
    shape = fields.get("shape")
    offsets = fields.get("data_offsets")
    dtype = fields.get("dtype")
  if not isinstance(dtype, str) or not _are_sizes(shape, _MAX_AXES):
    raise ValueError(f"tensor {name:.200} must have a dtype and a shape")
  if not _are_sizes(offsets, 2) or len(offsets) != 2 or offsets[0] > offsets[1]:
    raise ValueError(
      f"tensor {name:.200} must have data_offsets, two bytes in order"
    )
  start, stop = offsets
  return Entry(
    path, dtype[:20], tuple(shape), first_byte + start, first_byte + stop
  )


def _are_sizes(values: object, most: int) -> bool:
  """Returns whether a JSON value is a list of at most `most` sizes."""
  if not isinstance(values, list) or len(values) > most:
    return False
  return all(type(size) is int and 0 <= size <= _MAX_SIZE for size in values)


def file_size(file: IO[bytes]) -> int:
  """Returns the number of bytes of an open file.

  `epath.Path.stat` is no substitute: it fails where the user id has no name.
  """
  file.seek(0, io.SEEK_END)
  return file.tell()


def _check_bytes(
  entries: Mapping[str, Entry], first_byte: int, size: int, path: epath.Path
) -> None:
  """Raises a ValueError unless the tensors fill the file without a gap or an overlap."""
  end = first_byte
  in_file_order = sorted(
    entries.items(), key=lambda item: (item[1].start, item[1].stop)
  )
  for name, entry in in_file_order:
    if entry.start != end:
      raise ValueError(
        f"unreadable file {path}: tensor {name} must start at byte {end - first_byte}, "
        f"starts at {entry.start - first_byte}"
      )
    end = entry.stop
    num_bytes = entry.stop - entry.start
    if entry.dtype not in DTYPES:
      continue
    if num_bytes != math.prod(entry.shape) * entry.numpy_dtype.itemsize:
      raise ValueError(
        f"unreadable file {path}: {num_bytes} bytes are no {entry.dtype}{list(entry.shape)} {name}"
      )
  if end != size:
    raise ValueError(
      f"unreadable file {path}: its tensors take {end - first_byte} bytes, "
      f"{size - first_byte} are there"
    )


def read(entry: Entry, rows: slice = slice(None)) -> np.ndarray:
  """Reads some rows of a tensor in its stored dtype.

  Args:
    entry: Tensor of `read_header`; its dtype is one of `DTYPES`.
    rows: Rows of the first axis, without a step; only their bytes are read.

  Raises:
    ValueError: The file has become shorter since its header was read.
  """
  dtype = entry.numpy_dtype
  first, last, _ = rows.indices(entry.shape[0])
  row_shape = entry.shape[1:]
  bytes_per_row = math.prod(row_shape) * dtype.itemsize
  num_bytes = (last - first) * bytes_per_row
  with bounded.open_file(entry.path) as file:
    file.seek(entry.start + first * bytes_per_row)
    content = file.read(num_bytes)
  if len(content) != num_bytes:
    raise ValueError(
      f"a file must not change while it is read; {entry.path} has become shorter"
    )
  return np.frombuffer(content, dtype).reshape((last - first, *row_shape))


def write(
  path: epath.PathLike,
  specs: Mapping[str, tuple[Shape, np.dtype]],
  arrays: Iterable[np.ndarray],
) -> None:
  """Writes a file tensor by tensor, whole or not at all.

  Args:
    path: File to write; an existing one is replaced.
    specs: Shape and stored dtype (one of `DTYPES`) of every tensor by name, in the order of
      `arrays`.
    arrays: Tensors; they are taken one at a time.
  """
  name_of_dtype = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
  header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
  end = 0
  for name, (shape, dtype) in specs.items():
    start = end
    end += math.prod(shape) * np.dtype(dtype).itemsize
    header[name] = {
      "dtype": name_of_dtype[np.dtype(dtype)],
      "shape": list(shape),
      "data_offsets": [start, end],
    }
  text = json.dumps(header).encode()
  # Tensors start at a multiple of 8 bytes.
  text += b" " * (-len(text) % _LENGTH_BYTES)
  with atomic.replacing(path) as partial, partial.open("wb") as file:
    file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
    for array, (_, dtype) in zip(arrays, specs.values(), strict=True):
      file.write(array.astype(dtype, copy=False).tobytes())

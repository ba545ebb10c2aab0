"""Safetensors files, read by seeking and written tensor by tensor, on a disk or in a bucket.

The safetensors library maps files of the local disk only; here a tensor, or some of its rows, is
one ranged read of an `epath.Path`. The tests hold both to the same numbers.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import io
import json
import math

from etils import epath
import ml_dtypes
import numpy as np

from r3jax.files import atomic

Shape = tuple[int, ...]

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_MAX_HEADER = 100_000_000  # bytes, as in the library
_LENGTH = 8  # bytes that say how long the header is


@dataclasses.dataclass(frozen=True)
class Entry:
  """One tensor in a file.

  Attributes:
    path: the file.
    dtype: its name in the file; only those of `DTYPES` can be read.
    shape: of the tensor.
    start: first byte in the file.
  """

  path: epath.Path
  dtype: str
  shape: Shape
  start: int

  @property
  def numpy_dtype(self) -> np.dtype:
    """The dtype of the arrays that `read` returns."""
    return np.dtype(DTYPES[self.dtype])


def read_header(path: epath.PathLike) -> dict[str, Entry]:
  """Returns the tensors of a file by name; reads no tensor.

  Raises:
    ValueError: the file is cut off, or is no safetensors file.
  """
  path = epath.Path(path)
  with path.open("rb") as file:
    size = file_size(file)
    file.seek(0)
    length = int.from_bytes(file.read(_LENGTH), "little")
    if not 0 < length <= min(size - _LENGTH, _MAX_HEADER):
      raise ValueError(
        f"unreadable file {path}: {size} bytes hold no header of {length}"
      )
    text = file.read(length)
  try:
    header = json.loads(text)
    header.pop("__metadata__", None)
    spans, entries = {}, {}
    for name, entry in header.items():
      start, _ = spans[name] = tuple(map(int, entry["data_offsets"]))
      shape = tuple(map(int, entry["shape"]))
      entries[name] = Entry(
        path, str(entry["dtype"]), shape, _LENGTH + length + start
      )
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    raise ValueError(
      f"unreadable file {path}: its header is none of safetensors: {error!r}"
    ) from error
  _check_spans(entries, spans, size - _LENGTH - length, path)
  return entries


def file_size(file) -> int:
  """Returns the bytes of an open file (`epath.Path.stat` fails where a user has no name)."""
  file.seek(0, io.SEEK_END)
  return file.tell()


def _check_spans(
  entries: dict[str, Entry],
  spans: dict[str, tuple],
  size: int,
  path: epath.Path,
) -> None:
  """Raises a ValueError unless the tensors fill the bytes of the file without gap or overlap."""
  end = 0
  for name, (start, stop) in sorted(spans.items(), key=lambda item: item[1]):
    if start != end:
      raise ValueError(
        f"unreadable file {path}: tensor {name} must start at byte {end}, starts at {start}"
      )
    entry, end = entries[name], stop
    known = DTYPES.get(entry.dtype)
    if (
      known
      and stop - start != math.prod(entry.shape) * np.dtype(known).itemsize
    ):
      raise ValueError(
        f"unreadable file {path}: {stop - start} bytes are no {entry.dtype}{list(entry.shape)} {name}"
      )
  if end != size:
    raise ValueError(
      f"unreadable file {path}: its tensors take {end} bytes, {size} are there"
    )


def read(entry: Entry, rows: slice = slice(None)) -> np.ndarray:
  """Reads some rows of a tensor in its stored dtype.

  Args:
    entry: from `read_header`; its dtype is one of `DTYPES`.
    rows: of the first axis, without step; only their bytes are read.

  Raises:
    ValueError: the file has become shorter since its header was read.
  """
  dtype = entry.numpy_dtype
  first, last, _ = rows.indices(entry.shape[0])
  shape = (last - first, *entry.shape[1:])
  row_bytes = math.prod(entry.shape[1:]) * dtype.itemsize
  with entry.path.open("rb") as file:
    file.seek(entry.start + first * row_bytes)
    content = file.read((last - first) * row_bytes)
  if len(content) != (last - first) * row_bytes:
    raise ValueError(
      f"a file must not change while it is read; {entry.path} has become shorter"
    )
  return np.frombuffer(content, dtype).reshape(shape)


def write(
  path: epath.PathLike,
  specs: Mapping[str, tuple[Shape, np.dtype]],
  arrays: Iterable[np.ndarray],
) -> None:
  """Writes a file tensor by tensor, under its name only once it is whole.

  Args:
    path: of the file; one that is there is replaced.
    specs: shape and stored dtype (one of `DTYPES`) of the tensors by name, in the order of `arrays`.
    arrays: the tensors; one at a time is asked for.
  """
  path, labels = (
    epath.Path(path),
    {np.dtype(known): label for label, known in DTYPES.items()},
  )
  header, end = {"__metadata__": {"format": "pt"}}, 0
  for name, (shape, dtype) in specs.items():
    start, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
    header[name] = {
      "dtype": labels[np.dtype(dtype)],
      "shape": list(shape),
      "data_offsets": [start, end],
    }
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % _LENGTH)
  with atomic.replacing(path) as partial, partial.open("wb") as file:
    file.write(len(text).to_bytes(_LENGTH, "little") + text)
    for array, (_, dtype) in zip(arrays, specs.values(), strict=True):
      file.write(array.astype(dtype, copy=False).tobytes())

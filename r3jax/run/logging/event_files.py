"""Writes and reads TensorBoard's event files, and drops the steps that a resumed run repeats.

A file is a row of records: the length (8 bytes, little-endian), its checksum (4), an event as a
protocol buffer, its checksum (4). Records that stay are copied as they are.
"""

from collections.abc import Iterator, Mapping
from concurrent import futures
import dataclasses
import math
import socket
import struct
import time

from absl import logging
from etils import epath
from google.protobuf import message
import google_crc32c
import numpy as np
from tensorboard.compat.proto import event_pb2
from tensorboard.compat.proto import summary_pb2
from tensorboard.plugins.image import metadata as image_metadata
from tensorboard.plugins.scalar import summary_v2 as scalar_summary
from tensorboard.plugins.text import summary_v2 as text_summary
from tensorboard.util import tensor_util

from r3jax.files import atomic
from r3jax.model import preprocess

_PREFIX = "events.out.tfevents."
_LENGTH = struct.Struct("<Q")
_CHECKSUM = struct.Struct("<I")
_HEADER_BYTES = _LENGTH.size + _CHECKSUM.size
_MASK_SUM = 0xA282EAD8  # of the format of TensorFlow's records
_FILE_VERSION = "brain.Event:2"  # the first event of a file names its format
_NUM_READERS = 16  # files of a store that are read at a time: each is a request


@dataclasses.dataclass(frozen=True)
class _Record:
  """An event as it is stored.

  Attributes:
    content: Its bytes in the file, checksums included.
    event: The protocol buffer.
  """

  content: bytes
  event: event_pb2.Event


class Writer:
  """Writes events of one start of a run; what is written is in the file when a method returns.

  On a disk they are appended to one file. A store (a path with "://") cannot append: there, every
  event is a file of its own, written once. TensorBoard shows the files of a folder as one run.
  """

  def __init__(self, folder: epath.Path):
    """Makes the folder; a file is made with its first event.

    Args:
      folder: Folder of the event files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    self._folder = folder
    # TensorBoard reads files in the order of their names.
    self._prefix = f"{_PREFIX}{time.time():020.9f}"
    self._path: epath.Path | None = None
    self._num_files = 0

  def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Writes numbers by name, rounded to float32.

    Raises:
      OSError: The file cannot be written; the error names it.
    """
    summary = summary_pb2.Summary()
    for name, value in values.items():
      summary.MergeFrom(scalar_summary.scalar_pb(name, value))
    self._write(step, summary)

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    """Writes uint8 [H, W, 3] images by name.

    Raises:
      OSError: The file cannot be written; the error names it.
    """
    summary = summary_pb2.Summary()
    metadata = image_metadata.create_summary_metadata(
      display_name=None, description=None
    )
    for name, image in images.items():
      height, width, _ = image.shape
      content = [str(width), str(height), preprocess.png(image)]
      tensor = tensor_util.make_tensor_proto(content, dtype=np.object_)
      summary.value.add(tag=name, metadata=metadata, tensor=tensor)
    self._write(step, summary)

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    """Writes texts by name.

    Raises:
      OSError: The file cannot be written; the error names it.
    """
    summary = summary_pb2.Summary()
    for name, text in texts.items():
      summary.MergeFrom(text_summary.text_pb(name, text))
    self._write(step, summary)

  def _write(self, step: int, summary: summary_pb2.Summary) -> None:
    """Appends an event, or begins a file with it."""
    now = time.time()
    content = _as_record(
      event_pb2.Event(wall_time=now, step=step, summary=summary)
    )
    mode = "ab"
    if self._path is None or "://" in str(self._folder):
      name = f"{self._prefix}.{socket.gethostname()}.{self._num_files:06d}"
      self._path = self._folder / name
      self._num_files += 1
      version = event_pb2.Event(wall_time=now, file_version=_FILE_VERSION)
      content = _as_record(version) + content
      mode = "wb"
    try:
      with self._path.open(mode) as file:
        file.write(content)
    except OSError as error:
      # A write that fails does not say where.
      raise OSError(error.errno, error.strerror, str(self._path)) from error


def drop_after(folder: epath.Path, step: int | None) -> None:
  """Drops the events of later steps than `step`, or all files if it is None.

  Args:
    folder: Folder of the event files, which may not exist.
    step: Number of completed iterations.
  """
  paths = _files(folder)
  if step is None:
    for path in paths:
      path.unlink()
    return
  for path, content in _contents(paths):
    remaining = [
      record for record in _read(path, content) if record.event.step <= step
    ]
    if not any(record.event.HasField("summary") for record in remaining):
      path.unlink()
      continue
    shortened = b"".join(record.content for record in remaining)
    if shortened != content:
      atomic.write_bytes(path, shortened)


def scalars(folder: epath.Path, prefix: str) -> dict[int, dict[str, float]]:
  """Returns the numbers whose names begin with a prefix, by step and name."""
  numbers: dict[int, dict[str, float]] = {}
  for path, content in _contents(_files(folder)):
    for record in _read(path, content):
      for value in record.event.summary.value:
        if value.tag.startswith(prefix):
          number = tensor_util.make_ndarray(value.tensor)
          of_step = numbers.setdefault(record.event.step, {})
          of_step[value.tag] = float(number)
  return numbers


def same_numbers(stored: dict[str, float], values: dict[str, float]) -> bool:
  """Returns whether stored numbers are these, rounded to float32 as events hold them."""
  if stored.keys() != values.keys():
    return False
  for name, value in values.items():
    rounded = float(np.float32(value))
    both_missing = math.isnan(stored[name]) and math.isnan(rounded)
    if stored[name] != rounded and not both_missing:
      return False
  return True


def _files(folder: epath.Path) -> list[epath.Path]:
  """Returns the event files of a folder in the order in which they were written."""
  if not folder.exists():
    return []
  paths = sorted(
    path for path in folder.iterdir() if path.name.startswith(_PREFIX)
  )
  if "://" in str(folder):
    return paths  # a store has names only
  return [path for path in paths if path.is_file()]


def _contents(paths: list[epath.Path]) -> Iterator[tuple[epath.Path, bytes]]:
  """Yields files with what they hold, in their order."""
  with futures.ThreadPoolExecutor(_NUM_READERS) as pool:
    yield from zip(paths, pool.map(epath.Path.read_bytes, paths), strict=True)


def _masked(content: bytes) -> int:
  """Returns the checksum of bytes as a record holds it: rotate_15(crc32c) + a constant, mod 2³²."""
  checksum = google_crc32c.value(content)
  rotated = (checksum >> 15) | (checksum << 17)
  return (rotated + _MASK_SUM) % 2**32


def _as_record(event: event_pb2.Event) -> bytes:
  """Returns the bytes of a record, see above."""
  serialized = event.SerializeToString()
  length = _LENGTH.pack(len(serialized))
  return (
    length
    + _CHECKSUM.pack(_masked(length))
    + serialized
    + _CHECKSUM.pack(_masked(serialized))
  )


def _checked(content: bytes, start: int, length: int) -> bytes:
  """Returns the `length` bytes at `start`, which their checksum follows.

  Raises:
    ValueError: They are cut off or damaged.
  """
  end = start + length
  stored = content[end : end + _CHECKSUM.size]
  if len(stored) < _CHECKSUM.size:
    raise ValueError("cut off")
  checked = content[start:end]
  if _CHECKSUM.unpack(stored) != (_masked(checked),):
    raise ValueError("damaged")
  return checked


def _read(path: epath.Path, content: bytes) -> Iterator[_Record]:
  """Yields the records of a file; what is damaged, or was cut off by a crash, is left out.

  Behind a damaged record nothing says where the next one begins: the rest is left out, too.

  Args:
    path: Event file.
    content: What it holds.
  """
  start = 0
  while start < len(content):
    try:
      (length,) = _LENGTH.unpack(_checked(content, start, _LENGTH.size))
      event_start = start + _HEADER_BYTES
      serialized = _checked(content, event_start, length)
      event = event_pb2.Event.FromString(serialized)
    except (ValueError, message.DecodeError):
      logging.warning("%s is damaged or cut off behind byte %d", path, start)
      return
    end = event_start + length + _CHECKSUM.size
    yield _Record(content[start:end], event)
    start = end

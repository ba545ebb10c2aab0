"""Reads TensorBoard's event files, and drops the steps that a resumed run repeats.

A file is a row of records: the length (8 bytes, little-endian), its checksum (4), an event as a
protocol buffer, its checksum (4). Records that stay are copied as they are.
"""

from collections.abc import Iterator
import dataclasses
import math
import struct
from typing import Any

from absl import logging
from etils import epath
import numpy as np

from r3jax.files import atomic

_PATTERN = "events.out.tfevents.*"
_LENGTH = struct.Struct("<Q")
_CHECKSUM_BYTES = 4


@dataclasses.dataclass(frozen=True)
class _Record:
  """An event as it is stored.

  Attributes:
    content: Its bytes in the file, checksums included.
    event: The protocol buffer.
  """

  content: bytes
  event: Any


def drop_after(folder: epath.Path, step: int | None) -> None:
  """Drops the events of later steps than `step`, or all files if it is None.

  Args:
    folder: Folder of the event files, which may not exist.
    step: Number of completed iterations.

  Raises:
    ImportError: TensorFlow is not installed.
  """
  for path in _files(folder):
    if step is None:
      path.unlink()
      continue
    content = path.read_bytes()
    remaining = [
      record.content
      for record in _read(path, content)
      if record.event.step <= step
    ]
    shortened = b"".join(remaining)
    if shortened != content:
      atomic.write_bytes(path, shortened)


def scalars(folder: epath.Path, prefix: str) -> dict[int, dict[str, float]]:
  """Returns the numbers whose names begin with a prefix, by step and name.

  Raises:
    ImportError: TensorFlow is not installed.
  """
  import tensorflow as tf  # it takes seconds

  numbers: dict[int, dict[str, float]] = {}
  for path in _files(folder):
    for record in _read(path, path.read_bytes()):
      for value in record.event.summary.value:
        if value.tag.startswith(prefix):
          number = np.asarray(tf.make_ndarray(value.tensor))
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
  if not folder.exists():
    return []
  return sorted(path for path in folder.glob(_PATTERN) if path.is_file())


def _read(path: epath.Path, content: bytes) -> Iterator[_Record]:
  """Yields the records of a file; what is damaged, or was cut off by a crash, is left out.

  Behind a damaged record nothing says where the next one begins: the rest is left out, too.

  Args:
    path: Event file.
    content: What it holds.
  """
  import tensorflow as tf  # it takes seconds

  start = 0
  # It compares the checksums.
  events = tf.data.TFRecordDataset(str(path)).as_numpy_iterator()
  try:
    for serialized in events:
      event_start = start + _LENGTH.size + _CHECKSUM_BYTES
      end = event_start + len(serialized) + _CHECKSUM_BYTES
      event = tf.compat.v1.Event.FromString(serialized)
      yield _Record(content[start:end], event)
      start = end
  except tf.errors.DataLossError:
    logging.warning("%s is damaged or cut off behind byte %d", path, start)

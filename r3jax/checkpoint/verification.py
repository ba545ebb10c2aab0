"""Reads a training checkpoint on the host, piece by piece, and compares it with its digests.

Nothing here uses a device or waits for another process, so that it may run in a thread beside the
training. Memory holds one stored chunk of an array a thread.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
import dataclasses
import hashlib
import itertools
import json
import math
import os
import stat
import threading
from typing import Any

from etils import epath
import numpy as np
import tensorstore

from r3jax.checkpoint import digests
from r3jax.files import bounded
from r3jax.files import texts

STATE = "state"
DATA = "data"
DIGESTS = "digests"
_JSON_FILE = "metadata"  # of an item that Orbax writes as JSON
_ITEMS_FILE = "_CHECKPOINT_METADATA"
_VERSION = 1
_MAX_JSON = 64 << 20  # bytes
_MAX_LINE = 240  # characters of an error of a library

# What TensorStore says where a later try may succeed, or where the reader lacks a right. The
# checkpoint itself may be good.
_OF_THE_READER = (
  "UNAVAILABLE",
  "DEADLINE_EXCEEDED",
  "PERMISSION_DENIED",
  "UNAUTHENTICATED",
  "RESOURCE_EXHAUSTED",
  "CANCELLED",
)
# What TensorStore and the readers of JSON raise on damaged files.
DAMAGE = (
  ValueError,
  KeyError,
  TypeError,
  AttributeError,
  IndexError,
  NotImplementedError,
  RecursionError,
  OverflowError,
  FileNotFoundError,
  IsADirectoryError,
  NotADirectoryError,
)


class Damaged(ValueError):
  """Something of a checkpoint is missing, cut, changed or not finite; the message says what."""


class Stopped(Exception):
  """The reading was stopped; nothing is known of the checkpoint."""


class Unreadable(OSError):
  """A checkpoint cannot be read now; nothing says that it is damaged."""


@dataclasses.dataclass(frozen=True)
class Record:
  """What a checkpoint says of itself.

  Attributes:
    step: Number of completed iterations.
    state: Digest of every array by its name.
    data: Hash of the position of the prompt iterator.
    config: What all starts of its run have, JSON texts by key; empty where that is not known.
  """

  step: int
  state: Mapping[str, digests.Leaf]
  data: str
  config: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def to_json(self) -> dict[str, Any]:
    """Returns a JSON object that has a hash of itself."""
    content = {
      "version": _VERSION,
      "step": self.step,
      "state": {
        name: dataclasses.asdict(leaf) for name, leaf in self.state.items()
      },
      "data": self.data,
      "config": dict(self.config),
    }
    return content | {"check": hash_of_json(content)}


def hash_of_json(content: Any) -> str:
  """Returns 64 hex digits that do not depend on how the JSON value is written."""
  text = json.dumps(content, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def record(folder: epath.Path) -> Record | None:
  """Returns what a checkpoint says of itself; None for one from before there were digests.

  Args:
    folder: `checkpoints/STEP`.

  Raises:
    Damaged: It should have digests and has none, or they are damaged.
  """
  path = folder / DIGESTS / _JSON_FILE
  if not path.exists():
    items = _read_json(folder / _ITEMS_FILE)
    if DIGESTS in items.get("item_handlers", {}):
      raise Damaged(f"{DIGESTS}/{_JSON_FILE} is missing")
    return None
  content = _read_json(path)
  check = content.pop("check", None)
  if check != hash_of_json(content):
    raise Damaged(f"{DIGESTS}/{_JSON_FILE} is changed")
  if content["version"] != _VERSION:
    raise Unreadable(
      f"{path} is of a newer r3jax (version {content['version']}, not {_VERSION})"
    )
  state = {}
  for name, fields in content["state"].items():
    state[name] = digests.Leaf(**{**fields, "shape": tuple(fields["shape"])})
  # Checkpoints of earlier versions have no config.
  config = content.get("config", {})
  return Record(content["step"], state, content["data"], config)


def check(
  folder: epath.Path,
  prefix: str = "",
  share: tuple[int, int] = (0, 1),
  threads: int = 1,
  stop: threading.Event | None = None,
) -> bool:
  """Reads a checkpoint, or a part of it, and compares it with its digests.

  Args:
    folder: `checkpoints/STEP`.
    prefix: Only arrays whose names begin so are read.
    share: (k, n): only every n-th array is read, from the k-th on, the largest first.
    threads: Number of arrays that are read at the same time.
    stop: Ends the reading between two arrays when it is set.

  Returns:
    Whether there are digests. Without them every array is readable and finite, which is all that
    can be known.

  Raises:
    Damaged: Something is missing, cut, changed or not finite.
    Unreadable: The files cannot be read now.
    Stopped: `stop` has been set.
  """
  try:
    _check_files(folder)
    _check_orbax_files(folder / STATE)
    saved = record(folder)
    data = _read_json(folder / DATA / _JSON_FILE)
    if saved is not None:
      if str(saved.step) != folder.name:
        raise Damaged(f"it is the checkpoint of step {saved.step}")
      if hash_of_json(data) != saved.data:
        raise Damaged(f"{DATA}/{_JSON_FILE} is changed")
    arrays = _Arrays(folder / STATE)
    names = arrays.names() if saved is None else sorted(saved.state)
    if not names:
      raise Damaged(f"{STATE} holds no array")
  except (*DAMAGE, OSError) as error:
    raise explained(error) from error

  def size(name: str) -> int:
    return math.prod(saved.state[name].shape) if saved else 0

  names = [name for name in names if name.startswith(prefix)]
  names.sort(key=size, reverse=True)
  names = names[share[0] :: share[1]]
  with futures.ThreadPoolExecutor(threads) as pool:
    tasks = []
    for name in names:
      expected = saved.state[name] if saved else None
      tasks.append(pool.submit(arrays.check, name, expected))
    try:
      for task in tasks:
        if stop is not None and stop.is_set():
          raise Stopped
        task.result()
    finally:
      pool.shutdown(cancel_futures=True)
  return saved is not None


class _Arrays:
  """The arrays that Orbax has saved in a folder, read without a device."""

  def __init__(self, folder: epath.Path):
    path = f"{folder}/"
    base: str | dict = {"driver": "file", "path": path}
    if "://" in path:
      base = path
    self._kvstore = {"driver": "ocdbt", "base": base}
    # TensorStore must not keep what it has read.
    self._context = tensorstore.Context({"cache_pool": {}})
    self._driver_of_file = {"/.zarray": "zarr", "/zarr.json": "zarr3"}
    store = tensorstore.KvStore.open(self._kvstore, context=self._context)
    self._drivers = {}
    for key in store.result().list().result():
      for ending, driver in self._driver_of_file.items():
        if key.endswith(ending.encode()):
          name = key.decode().removesuffix(ending)
          self._drivers[name] = driver

  def names(self) -> list[str]:
    """Returns the names of all arrays."""
    return sorted(self._drivers)

  def check(self, name: str, expected: digests.Leaf | None) -> None:
    """Reads an array chunk by chunk and compares its digest.

    Args:
      name: Name of the array.
      expected: What was saved; None where that is not known.

    Raises:
      Damaged: It is missing, cannot be read, is another one or is not finite.
      Unreadable: It cannot be read now.
    """
    if name not in self._drivers:
      raise Damaged(f"{name} is missing")
    spec = {
      "driver": self._drivers[name],
      "kvstore": {**self._kvstore, "path": f"{name}/"},
    }
    try:
      array = tensorstore.open(
        spec, read=True, open=True, context=self._context
      ).result()
      dtype = array.dtype.numpy_dtype
      # First, because damaged sizes may be those of an endless array.
      if expected and (dtype.name, array.shape) != (
        expected.dtype,
        expected.shape,
      ):
        raise Damaged(f"{name} is {dtype.name}{list(array.shape)}")
      actual = digests.of_chunks(dtype, array.shape, _chunks(array))
    except (*DAMAGE, OSError) as error:
      raise explained(error, name) from error
    except (RuntimeError, MemoryError) as error:
      raise Unreadable(f"{name} cannot be read: {short(error)}") from error
    if expected is not None and actual != expected:
      raise Damaged(f"{name} has other numbers than those that were saved")
    if not actual.is_finite:
      raise Damaged(f"{name} is not finite")


def _chunks(array: Any) -> Iterator[tuple[np.ndarray, Sequence[int]]]:
  """Yields the stored chunks of an array and where they begin."""
  sizes = array.chunk_layout.read_chunk.shape or array.shape
  starts_of_axis = [
    range(0, length, max(1, size))
    for length, size in zip(array.shape, sizes, strict=True)
  ]
  for starts in itertools.product(*starts_of_axis):
    spans = tuple(
      slice(start, min(start + size, length))
      for start, size, length in zip(starts, sizes, array.shape, strict=True)
    )
    yield np.asarray(array[spans].read().result()), starts


def explained(error: Exception, name: str = "") -> Exception:
  """Returns Damaged or Unreadable, by what an error of a reader means."""
  if isinstance(error, (Damaged, Unreadable)):
    return error
  text = short(error)
  is_of_reader = isinstance(error, OSError) and not isinstance(error, DAMAGE)
  if is_of_reader or any(word in str(error) for word in _OF_THE_READER):
    return Unreadable(f"{name or 'it'} cannot be read now: {text}")
  return Damaged(f"{name} cannot be read: {text}".strip())


def short(error: Exception) -> str:
  """Returns the first line of an error, without the middle of a long one."""
  lines = str(error).splitlines() or [type(error).__name__]
  return texts.shorten(lines[0], _MAX_LINE)


def _check_files(folder: epath.Path) -> None:
  """Raises Damaged where a folder on a disk holds what is neither a file nor a folder.

  Opening a FIFO would wait for ever.
  """
  if "://" in str(folder):
    return
  for parent, _, names in os.walk(folder, followlinks=True):
    for name in names:
      path = os.path.join(parent, name)
      if not os.path.exists(path):
        raise Damaged(f"{os.path.relpath(path, folder)} leads to nothing")
      if not stat.S_ISREG(os.stat(path).st_mode):
        raise Damaged(f"{os.path.relpath(path, folder)} is no file")


def _check_orbax_files(state: epath.Path) -> None:
  """Raises Damaged where what Orbax needs beside the arrays is no JSON.

  Orbax would fail in the middle of its reads, and others of them would print tracebacks later.
  """
  needed = [state / "_METADATA"]
  optional = [state / "_sharding"]
  folder = state / "array_metadatas"
  if folder.is_dir():
    optional += list(folder.iterdir())
  for path in (*needed, *(path for path in optional if path.exists())):
    _read_json(path)


def _read_json(path: epath.Path) -> dict:
  """Reads a JSON object; raises Damaged where there is none."""
  shown = f"{path.parent.name}/{path.name}"
  if not path.exists():
    raise Damaged(f"{shown} is missing")
  try:
    content = bounded.read_bytes(path, _MAX_JSON)
  except ValueError as error:
    raise Damaged(f"{shown} cannot be read: {short(error)}") from error
  try:
    value = json.loads(content)
  except (ValueError, RecursionError) as error:
    raise Damaged(f"{shown} must be JSON") from error
  if not isinstance(value, dict):
    raise Damaged(f"{shown} must be a JSON object")
  return value

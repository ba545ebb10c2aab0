"""Reads files and JSON of others within limits: the kind of file, bytes, levels, values, numbers.

Whoever wrote a model folder, a file of prompts or the reply of a service may have wanted to hang
or crash the reader. A pipe is refused and never opened, a huge file is not read whole, and JSON has
limits on what can take unbounded time, memory or stack.
"""

from collections.abc import Callable, Iterable
import dataclasses
import errno
import json
import math
import os
import pathlib
import stat
from typing import IO

from etils import epath

# Names of what can be at a path beside a file.
_KINDS = {
  stat.S_IFIFO: "a pipe",
  stat.S_IFCHR: "a device",
  stat.S_IFBLK: "a device",
  stat.S_IFSOCK: "a socket",
}
# Where Hugging Face's cache keeps the files to which the links of a snapshot lead.
_SNAPSHOTS = "snapshots"
_BLOBS = "blobs"
_CHUNK = 2**22  # bytes that are read at once


@dataclasses.dataclass(frozen=True)
class Limits:
  """What JSON may hold.

  Attributes:
    max_bytes: Bytes of a file, or characters of a text.
    max_levels: Objects and lists inside of each other.
    max_values: Values of all objects and lists, and commas and brackets of all texts.
  """

  max_bytes: int = 2**27
  max_levels: int = 50
  max_values: int = 10_000_000


DEFAULT_LIMITS = Limits()
# The messages of services and the lines of files are small.
MESSAGE_LIMITS = Limits(max_bytes=2**27, max_values=1_000_000)

# Builds an object from its keys and values, see `json.loads`.
PairsHook = Callable[[list[tuple[str, object]]], dict]


def open_file(path: epath.PathLike) -> IO[bytes]:
  """Opens a file to read its bytes; a pipe, a device or a socket is never waited for.

  Args:
    path: On a disk or in a bucket.

  Raises:
    ValueError: It is no regular file.
    OSError: It cannot be opened; a folder is an IsADirectoryError.
  """
  path = epath.Path(path)
  if "://" in str(path):
    return path.open("rb")
  _check_kind(path, os.stat(path))
  # Should it have become a pipe since then, opening does not wait for a writer.
  descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
  try:
    _check_kind(path, os.fstat(descriptor))
    return os.fdopen(descriptor, "rb")
  except (OSError, ValueError):
    os.close(descriptor)
    raise


def _check_kind(path: epath.Path, status: os.stat_result) -> None:
  """Raises an error where a path leads to no regular file.

  Raises:
    IsADirectoryError: It is a folder.
    ValueError: It is a pipe, a device or a socket.
  """
  if stat.S_ISDIR(status.st_mode):
    # Python's own error would name the descriptor in place of the path, and leave it open.
    raise IsADirectoryError(
      errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path)
    )
  kind = _KINDS.get(stat.S_IFMT(status.st_mode))
  if kind is not None:
    raise ValueError(f"{path} must be a regular file; it is {kind}")


def check_link(path: epath.PathLike) -> None:
  """Refuses a link in a folder that may come from others, if it leads out of the folder.

  A link may lead to a file in its own folder, in a folder beside it, or in the `blobs` of Hugging
  Face's cache.

  Args:
    path: File in the folder.

  Raises:
    ValueError: It is a link that leads somewhere else.
  """
  if "://" in str(path) or not os.path.islink(path):
    return
  link = pathlib.Path(path)
  folder = link.parent.resolve()
  target = pathlib.Path(os.path.realpath(link))
  is_inside = target.is_relative_to(folder)
  is_beside = target.parent.parent == folder.parent
  blobs = folder.parent.parent / _BLOBS
  is_blob = folder.parent.name == _SNAPSHOTS and target.parent == blobs
  if not (is_inside or is_beside or is_blob):
    raise ValueError(
      f"{path} must not lead out of its folder, as a link to {target}: copy the file there"
    )


def read_bytes(
  path: epath.PathLike, max_bytes: int = DEFAULT_LIMITS.max_bytes
) -> bytes:
  """Returns the content of a file.

  Raises:
    ValueError: It is no regular file, or is longer than `max_bytes`.
    OSError: It cannot be read.
  """
  # In chunks: reading so many bytes at once takes the memory for them, whatever is there.
  chunks = []
  size = 0
  with open_file(path) as file:
    while chunk := file.read(_CHUNK):
      chunks.append(chunk)
      size += len(chunk)
      if size > max_bytes:
        raise ValueError(
          f"{path} must have at most {max_bytes} bytes; it has more"
        )
  return b"".join(chunks)


def read_text(
  path: epath.PathLike, max_bytes: int = DEFAULT_LIMITS.max_bytes
) -> str:
  """Returns the text of a file; raises as `read_bytes`, and a ValueError where it is not UTF-8."""
  content = read_bytes(path, max_bytes)
  try:
    return content.decode()
  except UnicodeDecodeError as error:
    raise ValueError(f"{path} must be UTF-8: {error}") from error


def read_json(path: epath.PathLike, limits: Limits = DEFAULT_LIMITS) -> object:
  """Returns the value of a JSON file.

  Raises:
    ValueError: It is no regular file, is not JSON, or exceeds the limits; names the file.
    OSError: It cannot be read.
  """
  text = read_text(path, limits.max_bytes)
  try:
    return parse_json(text, limits)
  except ValueError as error:
    raise ValueError(f"{path} must be JSON: {error}") from error


def read_json_object(
  path: epath.PathLike, limits: Limits = DEFAULT_LIMITS
) -> dict:
  """Returns the object in a JSON file; raises as `read_json`, and where it holds another value."""
  value = read_json(path, limits)
  if not isinstance(value, dict):
    raise ValueError(
      f"{path} must hold a JSON object; it holds a {type(value).__name__}"
    )
  return value


def parse_json(
  text: str | bytes,
  limits: Limits = DEFAULT_LIMITS,
  allow_nan: bool = False,
  pairs_hook: PairsHook | None = None,
) -> object:
  """Returns the value of JSON; takes time and memory in proportion to its length.

  Args:
    text: JSON; bytes are UTF-8.
    limits: What it may hold.
    allow_nan: Whether NaN and Infinity, which are no JSON, are read as numbers. Numbers that a
      float cannot hold, such as 1e999 and whole ones of 400 digits, are always refused.
    pairs_hook: Builds the objects, for example to refuse a key that stands twice.

  Raises:
    json.JSONDecodeError: It is not JSON.
    ValueError: It is not UTF-8, exceeds the limits, or has a number that is refused.
  """
  if isinstance(text, bytes):
    text = text.decode()
  if len(text) > limits.max_bytes:
    raise ValueError(
      f"it must have at most {limits.max_bytes} characters; got {len(text)}"
    )
  # An upper bound: texts may hold commas and brackets, too.
  num_values = text.count(",") + text.count("[") + text.count("{") + 1
  if num_values > limits.max_values:
    raise ValueError(
      f"it must have at most {limits.max_values} values; it may have {num_values}"
    )
  try:
    value = json.loads(
      text,
      object_pairs_hook=pairs_hook,
      parse_int=_whole_number,
      parse_float=_finite_number,
      parse_constant=float if allow_nan else _refuse_constant,
    )
  except RecursionError as error:
    raise ValueError(_too_deep(limits.max_levels)) from error
  check_levels(value, limits)
  return value


def check_levels(value: object, limits: Limits) -> None:
  """Checks how deep lists, tuples and dicts are nested and how many values they have, with a loop.

  A value that stands at several places counts at each of them: whoever walks through the values
  meets it as often.

  Raises:
    ValueError: They exceed the limits.
  """
  containers = _containers([value])
  num_values = 1
  num_levels = 0
  while containers:
    num_levels += 1
    if num_levels > limits.max_levels:
      raise ValueError(_too_deep(limits.max_levels))
    inner = []
    for container in containers:
      is_dict = isinstance(container, dict)
      values = container.values() if is_dict else container
      num_values += len(values)
      if num_values > limits.max_values:
        raise ValueError(f"it must have at most {limits.max_values} values")
      inner += _containers(values)
    containers = inner


def _containers(values: Iterable[object]) -> list[dict | list | tuple]:
  return [value for value in values if isinstance(value, (dict, list, tuple))]


def _too_deep(max_levels: int) -> str:
  return f"it must be nested at most {max_levels} levels deep"


def _whole_number(digits: str) -> int:
  """Returns the number of some digits, unless a float cannot hold it.

  Whoever draws or averages it makes a float of it, and reading many digits takes quadratic time.
  """
  _finite_number(digits)
  return int(digits)


def _finite_number(digits: str) -> float:
  """Returns the number of some digits, unless a float cannot hold it."""
  number = float(digits)
  if math.isinf(number):
    raise ValueError(f"a number must be finite as a float; got {digits:.40}")
  return number


def _refuse_constant(name: str) -> float:
  raise ValueError(f"{name} is no JSON number")

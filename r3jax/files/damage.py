"""Explains damaged files of our own in one line, and finds what lies in the place of one.

What a run has written may be cut off by a full disk, edited by hand or replaced by something else.
Whoever reads such a file says what it must be, what it is, and what to do.
"""

from collections.abc import Iterable, Iterator
import contextlib
import os

from etils import epath

from r3jax.files import bounded

# What reading JSON, and building values from it, raises where the file is not as it was written.
_OF_DAMAGE = (
  OSError,
  ValueError,
  KeyError,
  IndexError,
  TypeError,
  AttributeError,
  OverflowError,
  RecursionError,
)
_MAX_REASON = 200
# Bytes of a file of our own: the log of a long run has gigabytes.
_MAX_BYTES = 2**36


def reason(error: BaseException) -> str:
  """Returns what an error says, in one short line."""
  if isinstance(error, KeyError):
    return f"it has no {error}"
  if isinstance(error, RecursionError):
    return "it is nested too deep"
  text = " ".join(str(error).split()) or type(error).__name__
  return text if len(text) <= _MAX_REASON else f"{text[:_MAX_REASON]}..."


@contextlib.contextmanager
def explained(
  path: epath.PathLike, meaning: str, remedy: str
) -> Iterator[None]:
  """Raises one ValueError for what a damaged file raises in the block that reads it.

  Args:
    path: File that is read.
    meaning: What it must be, for example "the summary of a run".
    remedy: What to do, as a sentence without its full stop.

  Raises:
    ValueError: The block raised an error.
  """
  try:
    yield
  except _OF_DAMAGE as error:
    raise ValueError(
      f"{path} must be {meaning}; it is damaged: {reason(error)}. {remedy}"
    ) from error


def parse_object(text: str | bytes, allow_nan: bool = True) -> dict:
  """Returns the object of a JSON text.

  Args:
    text: JSON; bytes are UTF-8.
    allow_nan: See `bounded.parse_json`.

  Raises:
    ValueError: It is not JSON, or no object.
    RecursionError: It is nested too deep.
  """
  values = bounded.parse_json(text, allow_nan=allow_nan)
  if not isinstance(values, dict):
    raise ValueError(f"it must be a JSON object, and is {text[:40]!r}")
  return values


def read_bytes(path: epath.PathLike) -> bytes:
  """Returns the content of a file; a pipe is never waited for.

  Raises:
    ValueError: What lies there is no file.
    OSError: It is missing, or cannot be read.
  """
  return bounded.read_bytes(path, _MAX_BYTES)


def read_object(path: epath.PathLike) -> dict:
  """Returns the object of a JSON file.

  Raises:
    ValueError: It is not JSON, or no object.
    OSError: It cannot be read.
    RecursionError: It is nested too deep.
  """
  return parse_object(read_bytes(path))


def check_kinds(
  files: Iterable[epath.Path], folders: Iterable[epath.Path]
) -> None:
  """Checks that files and folders that will be written are such, or missing.

  Raises:
    ValueError: Something else lies in the place of some; one line for all.
  """
  problems = []
  for path in files:
    if _exists(path) and not _is_file(path):
      problems.append(f"{path} must be a file")
  for path in folders:
    if _exists(path) and not path.is_dir():
      problems.append(f"{path} must be a folder")
  if problems:
    raise ValueError(
      "; ".join(problems) + ": move away what lies there instead"
    )


def _is_file(path: epath.Path) -> bool:
  """Returns whether a path is a regular file; `epath` calls a pipe one, too."""
  if "://" in str(path):
    return path.is_file()
  return os.path.isfile(path)


def _exists(path: epath.Path) -> bool:
  """Returns whether something has a path, be it a link that leads nowhere."""
  if "://" in str(path):
    return path.exists()
  return os.path.lexists(path)

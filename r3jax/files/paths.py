"""Paths on disks, in buckets and at the Hugging Face Hub: as users write and mistype them."""

import difflib
import os
import pathlib

from etils import epath

from r3jax.files import hub


def of_user(path: epath.PathLike) -> epath.Path:
  """Returns the path that a user means, with the home folder in place of a leading "~".

  Shells leave the "~" of `--flag=~/folder` as it is. An address of the Hub (hf://OWNER/NAME) is
  downloaded first, see `hub`, and the result is where it is on this machine.

  Raises:
    ValueError: There is no such home, or no such address.
  """
  text = os.fspath(path)
  if text.startswith(hub.PREFIX):
    return epath.Path(hub.local_path(text))
  expanded = os.path.expanduser(text)
  if expanded.startswith("~"):
    raise ValueError(
      f"a path that begins with '~' must begin with a home folder, and none is known; got {text!r} "
      "(a folder of that name is './~...')"
    )
  return epath.Path(expanded)


def absolute(path: epath.PathLike) -> epath.Path:
  """Returns an absolute path; gs://BUCKET/FOLDER is one already.

  `epath.Path.absolute` turns such a path into a folder "gs:" of the working
  directory.
  """
  path = epath.Path(path)
  if path.is_absolute():
    return path
  return path.absolute()


def did_you_mean(path: epath.PathLike) -> str:
  """Returns "; did you mean PATH?" with the nearest path that exists, "" where none is near.

  The first part of the path that does not exist is compared with what lies beside it. Buckets and
  URLs are left out: listing them may take long.

  Args:
    path: which cannot be read; where it exists, the result is "".
  """
  if "://" in str(path):
    return ""
  missing = pathlib.Path(path)
  # Unlike pathlib, os.path does not raise where a name is too long.
  if os.path.exists(missing):
    return ""
  while not os.path.exists(missing.parent):
    missing = missing.parent
  if not os.access(missing.parent, os.R_OK) or not missing.parent.is_dir():
    return ""
  names = os.listdir(missing.parent)
  nearest = difflib.get_close_matches(missing.name, names, n=1)
  return f"; did you mean {missing.parent / nearest[0]}?" if nearest else ""


def file_times(folder: epath.PathLike) -> tuple[tuple[str, int, int], ...]:
  """Returns name, size and time of every file below a folder; () for one in a bucket."""
  if "://" in str(folder):
    return ()
  times = []
  for parent, _, names in os.walk(folder):
    for name in names:
      file = os.path.join(parent, name)
      status = os.lstat(file)
      times.append((file, status.st_size, status.st_mtime_ns))
  return tuple(times)

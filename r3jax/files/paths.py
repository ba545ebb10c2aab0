"""Absolute paths on disks and in buckets, as Orbax requires them, and mistyped paths."""

import difflib
import pathlib

from etils import epath


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
  if missing.exists():
    return ""
  while not missing.parent.exists():
    missing = missing.parent
  if not missing.parent.is_dir():
    return ""
  names = [other.name for other in missing.parent.iterdir()]
  nearest = difflib.get_close_matches(missing.name, names, n=1)
  return f"; did you mean {missing.parent / nearest[0]}?" if nearest else ""

"""Folders that keep what can be made again; where one cannot be used, nothing is kept."""

import functools
import os

from absl import logging
from etils import epath

from r3jax.files import atomic
from r3jax.files import paths

_HOME = "~/.cache/r3jax"


def folder(
  variable: str, name: str = "", may_be_read_only: bool = False
) -> epath.Path | None:
  """Returns the folder of a cache, made if needed; None where there can be none.

  Args:
    variable: Environment variable that names the folder.
    name: Of the folder in ~/.cache/r3jax that is the default.
    may_be_read_only: See `usable`.
  """
  place = os.environ.get(variable) or f"{_HOME}/{name}".rstrip("/")
  return usable(place, variable, may_be_read_only)


@functools.cache
def usable(
  place: str, variable: str, may_be_read_only: bool = False
) -> epath.Path | None:
  """Returns a folder that files can be written into; None, with a warning, where they cannot.

  Args:
    place: Path of the folder.
    variable: Environment variable that names another one, for the warning.
    may_be_read_only: Whether a folder that others have filled will do.
  """
  try:
    path = paths.of_user(place)
    if may_be_read_only and path.is_dir():
      return path
    atomic.check_writable(path)
  except (OSError, ValueError) as error:
    logging.warning(
      "nothing is kept for the next start: %s cannot be written (%s); %s names another folder",
      place,
      error,
      variable,
    )
    return None
  return path

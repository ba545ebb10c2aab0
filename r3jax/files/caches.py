"""Folders that keep what can be made again; where one cannot be written, nothing is kept."""

import functools
import os

from absl import logging
from etils import epath

from r3jax.files import atomic
from r3jax.files import paths

_HOME = "~/.cache/r3jax"


def folder(variable: str, name: str = "") -> epath.Path | None:
  """Returns the folder of a cache, made if needed; None where nothing can be kept.

  Args:
    variable: Environment variable that names the folder.
    name: Of the folder in ~/.cache/r3jax that is the default.
  """
  place = os.environ.get(variable) or f"{_HOME}/{name}".rstrip("/")
  return writable(place, variable)


@functools.cache
def writable(place: str, variable: str) -> epath.Path | None:
  """Returns a folder that files can be written into; None, with a warning, where they cannot.

  Args:
    place: Path of the folder.
    variable: Environment variable that names another one, for the warning.
  """
  try:
    path = paths.of_user(place)
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

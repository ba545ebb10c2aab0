"""Finds a user's own world, reward or benchmark by `package.module:attribute`."""

import importlib
import os
import traceback


def is_path(name: str) -> bool:
  """Returns whether a config's value has the form `package.module:attribute`."""
  module_name, separator, attribute = name.partition(":")
  return bool(module_name and separator and attribute)


def load(path: str, key: str) -> object:
  """Imports a module and returns one of its attributes.

  The module is found as Python finds every module: installed, or in a folder of PYTHONPATH.

  Args:
    path: `package.module:attribute`.
    key: the config's key that holds the path, for the message.

  Raises:
    ValueError: the path has another form, the module cannot be imported (the message has the line
      of the user's file), or it has no such attribute.
  """
  if not is_path(path):
    raise ValueError(
      f"{key} must have the form 'package.module:attribute'; got {path!r}"
    )
  module_name, _, attribute = path.partition(":")
  try:
    module = importlib.import_module(module_name)
  # The module is the user's own, and may raise anything.
  except Exception as error:
    place = _place_of(error)
    if isinstance(error, ImportError) and not place:
      raise ValueError(
        f"{key} is {path!r}, so the module {module_name} must be importable (installed, or in a "
        f"folder of PYTHONPATH); {error}"
      ) from error
    text = " ".join(str(error).split())
    raise ValueError(
      f"{key} is {path!r}, so the module {module_name} must be importable; {place}: "
      f"{type(error).__name__}: {text}"
    ) from error
  if not hasattr(module, attribute):
    raise ValueError(
      f"{key} is {path!r}, so {module_name} must define {attribute}; it does not"
    )
  return getattr(module, attribute)


def _place_of(error: Exception) -> str:
  """Returns "FILE, line N": the last line of the imported file that led to an error.

  Files beside it count too; libraries that it calls do not. Returns "" where no file was run.
  """
  if isinstance(error, SyntaxError) and error.filename:
    return f"{error.filename}, line {error.lineno}"
  place = ""
  folder = None
  # The first frames are those of `load` and of the import system.
  for frame in traceback.extract_tb(error.__traceback__)[1:]:
    if _imports(frame.filename):
      continue
    folder = folder or os.path.dirname(frame.filename)
    if os.path.dirname(frame.filename) == folder:
      place = f"{frame.filename}, line {frame.lineno}"
  return place


def _imports(filename: str) -> bool:
  """Returns whether a frame's file is part of the import system."""
  return filename.startswith("<frozen") or filename.endswith(
    os.path.join("importlib", "__init__.py")
  )

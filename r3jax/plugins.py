"""Finds a user's own world, reward or benchmark by `package.module:attribute`."""

import importlib


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
    ValueError: the path has another form, the module cannot be imported, or it has no such
      attribute.
  """
  if not is_path(path):
    raise ValueError(
      f"{key} must have the form 'package.module:attribute'; got {path!r}"
    )
  module_name, _, attribute = path.partition(":")
  try:
    module = importlib.import_module(module_name)
  except ImportError as error:
    raise ValueError(
      f"{key} is {path!r}, so the module {module_name} must be importable (installed, or in a "
      f"folder of PYTHONPATH); {error}"
    ) from error
  if not hasattr(module, attribute):
    raise ValueError(
      f"{key} is {path!r}, so {module_name} must define {attribute}; it does not"
    )
  return getattr(module, attribute)

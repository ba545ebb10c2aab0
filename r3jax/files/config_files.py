"""Finds and loads config files, by path or by the name of one that ships with the package.

A config file is Python: `get_config(variant)` returns a locked ConfigDict. On a command line it is
written `configs/r3_geneval.py:shapes` (a path) or `r3_geneval:shapes` (a name), where the variant
after the colon may be left out.
"""

import difflib
import importlib.util
import inspect
import os
import pathlib
import sys
import traceback

import ml_collections

from r3jax.files import paths

# What config files call the folder that they import each other from: `from configs import slices`.
PACKAGE = "configs"
# Not the hidden files that file systems and editors put beside them.
_MODULES = "[!.]*.py"


def shipped_folder() -> pathlib.Path:
  """Returns the folder of the config files that ship with the package.

  A wheel holds them inside of the package; in a checkout they lie beside it.
  """
  package_folder = pathlib.Path(__file__).parents[1]
  installed = package_folder / PACKAGE
  if installed.is_dir():
    return installed
  return package_folder.parent / PACKAGE


def shipped_files() -> list[pathlib.Path]:
  """Returns the Python files of that folder, by name."""
  return sorted(shipped_folder().glob(_MODULES))


def shipped_names() -> list[str]:
  """Returns the names of the config files that ship with the package."""
  return [
    path.stem
    for path in shipped_files()
    if "def get_config(" in path.read_text()
  ]


def find(name: str) -> tuple[pathlib.Path, str]:
  """Returns the path of a config file, and its variant ("" where none is named).

  Args:
    name: a path or a shipped name, with or without ":VARIANT".

  Raises:
    ValueError: there is no such file; the message names the nearest.
  """
  file, _, variant = name.partition(":")
  is_path = file.endswith(".py") or "/" in file
  path = shipped_folder() / f"{file}.py"
  if is_path:
    path = pathlib.Path(paths.of_user(file))
  if os.path.isfile(path) and path.suffix == ".py":
    return path, variant
  names = shipped_names()
  message = (
    f"--config must be a config file or one of {', '.join(names)}; got {file!r}"
  )
  nearest = difflib.get_close_matches(path.stem, names, n=1)
  if nearest:
    message += f"; did you mean {nearest[0]}?"
  elif is_path:
    message += paths.did_you_mean(path)
  raise ValueError(message)


def make_importable(folder: pathlib.Path) -> None:
  """Lets config files import each other: `configs` is their own folder, then the shipped one."""
  if PACKAGE not in sys.modules:
    spec = importlib.util.spec_from_loader(PACKAGE, None, is_package=True)
    sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
  sys.modules[PACKAGE].__path__ = [
    str(folder.absolute()),
    str(shipped_folder()),
  ]


def load(name: str) -> ml_collections.ConfigDict:
  """Returns the locked config of a name such as "r3_geneval:shapes" or a path.

  Raises:
    ValueError: there is no such file, it has no such variant, or it sets what a config does not
      have; the message has the line.
  """
  path, variant = find(name)
  make_importable(path.parent)
  try:
    return _load(path, variant)
  except _MISTAKES as error:
    raise ValueError(_place_of(error, path)) from error


# What a mistyped name, key or value in a config file raises.
_MISTAKES = (
  AttributeError,
  ImportError,
  KeyError,
  NameError,
  SyntaxError,
  TypeError,
)


def _load(path: pathlib.Path, variant: str) -> ml_collections.ConfigDict:
  """Runs a config file, and returns the locked config of a variant."""
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, "get_config"):
    raise ValueError(f"{path} must define get_config; it does not")
  if variant and not inspect.signature(module.get_config).parameters:
    raise ValueError(f"{path} has no variants; got {variant!r}")
  arguments = [variant] if variant else []
  return module.get_config(*arguments).lock()


def _place_of(error: Exception, path: pathlib.Path) -> str:
  """Returns a line with what an error says, and the last line of a file that led to it."""
  number = getattr(error, "lineno", None)
  for frame in traceback.extract_tb(error.__traceback__):
    if frame.filename == str(path.absolute()):
      number = frame.lineno
  # ml_collections suggests the nearest key in a line of its own.
  text = " ".join(str(error.args[0] if error.args else error).split())
  return f"{path}, line {number}: {type(error).__name__}: {text}"

"""Orbax's writers of arrays and JSON, which tell at once when a write has failed.

Orbax raises an error of its background threads only after all processes have met. Where the disk of
one process is full, the others wait for it in another place, and none gets further until Orbax's
timeout of minutes.
"""

from collections.abc import Sequence
from typing import Any

from etils import epath
import orbax.checkpoint as ocp


class Failures:
  """The errors of writes, in the order in which they happened."""

  def __init__(self):
    """Starts without any."""
    self._errors: list[Exception] = []

  @property
  def first(self) -> Exception | None:
    """The first error, None where all is well."""
    return self._errors[0] if self._errors else None

  def add(self, error: Exception) -> None:
    """Adds an error; may be called by any thread."""
    self._errors.append(error)


class _Commit:
  """A write in the background: a future as Orbax defines it, whose error is noted."""

  def __init__(self, commit: Any, failures: Failures):
    self._commit = commit
    self._failures = failures

  def result(self, timeout: float | None = None) -> Any:
    try:
      return self._commit.result(timeout)
    # Whatever it is: it is noted and goes on.
    except Exception as error:
      self._failures.add(error)
      raise

  def cancel(self) -> bool | None:
    return self._commit.cancel()


class _Telling:
  """Lets a handler of Orbax, the next class in line, tell of its errors at once."""

  def __init__(self, failures: Failures):
    super().__init__()
    self._failures = failures

  async def async_save(self, *arguments, **options):
    commits = await super().async_save(*arguments, **options)
    return [_Commit(commit, self._failures) for commit in commits or ()]

  def finalize(self, directory: epath.Path) -> None:
    try:
      super().finalize(directory)
    # Whatever it is: it is noted and goes on.
    except Exception as error:
      self._failures.add(error)
      raise

  @classmethod
  def typestr(cls) -> str:
    # It stands in the checkpoint, and Orbax must find it without this module.
    return cls.__bases__[-1].typestr()


class _Arrays(_Telling, ocp.StandardCheckpointHandler):
  pass


class _Json(_Telling, ocp.JsonCheckpointHandler):
  pass


def registry(
  arrays: str, texts: Sequence[str], failures: Failures
) -> ocp.handlers.CheckpointHandlerRegistry:
  """Returns the writers and readers of the items of a checkpoint.

  Args:
    arrays: Name of the item that is a tree of arrays.
    texts: Names of the items that are JSON.
    failures: Gets the errors of writes.
  """
  handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
  writer = _Arrays(failures)
  handlers.add(arrays, ocp.args.StandardSave, writer)
  handlers.add(arrays, ocp.args.StandardRestore, writer)
  for name in texts:
    json_writer = _Json(failures)
    handlers.add(name, ocp.args.JsonSave, json_writer)
    handlers.add(name, ocp.args.JsonRestore, json_writer)
  return handlers

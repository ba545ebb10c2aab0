"""Keeps a run's configuration beside its results and refuses to resume it with another one."""

from collections.abc import Sequence
import fnmatch
import json

from absl import logging
from etils import epath
import jax

from r3jax.files import atomic
from r3jax.files import damage

_MISSING = "<missing>"


def check_writable(folder: epath.PathLike, name: str) -> None:
  """Makes a folder and writes a probe: a run must fail before its hours, not after.

  Args:
    folder: What is going to be written.
    name: Of the flag or argument that names it, for the message.

  Raises:
    ValueError: The folder cannot be made or written.
  """
  try:
    atomic.check_writable(folder)
  except OSError as error:
    raise ValueError(
      f"{name} must be a writable folder, got {str(folder)!r}: {error}"
    ) from error


def check(
  workdir: epath.PathLike, config: dict, may_differ: Sequence[str]
) -> dict[str, tuple[str, str]]:
  """Checks a later start by workdir/config.json, where there is one; writes nothing.

  For the arguments and errors see `write_or_check`.

  Returns:
    The changes of keys that may differ, as `differences` does.
  """
  path = epath.Path(workdir) / "config.json"
  if not path.exists():
    return {}
  remedy = "Restore it; or delete it where the command is the one that wrote the folder"
  with damage.explained(path, "the config of what is in its folder", remedy):
    former = damage.read_object(path)
    if not former.keys() & config.keys():
      raise ValueError("it has none of the keys of a config")
  # Compared as it will be read: JSON makes lists of tuples.
  changes = differences(former, json.loads(json.dumps(config)))
  _refuse_changes(path, changes, may_differ)
  return changes


def write_or_check(
  workdir: epath.PathLike, config: dict, may_differ: Sequence[str]
) -> None:
  """Writes workdir/config.json on the first start; checks later starts by it.

  Every process checks; process 0 writes, and keeps the file up to date with
  allowed changes.

  Args:
    workdir: Folder of the run.
    config: Nested dict of JSON values (ConfigDict.to_dict()).
    may_differ: Dotted prefixes of the keys that do not change what an iteration
      computes, for example "mesh", "log", "total_steps"; "*" stands for any names in
      between.

  Raises:
    ValueError: Another key differs; the message has the values of both starts.
  """
  changes = check(workdir, config, may_differ)
  for key, (old, new) in changes.items():
    logging.info("config %s was %s, is now %s", key, old, new)
  path = epath.Path(workdir) / "config.json"
  text = json.dumps(config, indent=2, sort_keys=True) + "\n"
  if jax.process_index() == 0:
    atomic.write_text(path, text)


def _refuse_changes(
  path: epath.Path,
  changes: dict[str, tuple[str, str]],
  may_differ: Sequence[str],
) -> None:
  """Raises a ValueError that lists the changes of keys that must agree."""
  refused = [
    f"  {key}: {old} there, {new} now"
    for key, (old, new) in changes.items()
    if not _is_under(key, may_differ)
  ]
  if refused:
    raise ValueError(
      f"{path} must agree with the configuration of a run that resumes there, but these keys "
      "differ (set them back, or use another workdir):\n" + "\n".join(refused)
    )


def differences(old: dict, new: dict) -> dict[str, tuple[str, str]]:
  """Returns the keys in which two configs differ.

  Args:
    old: Config as JSON returns it.
    new: Another one.

  Returns:
    {dotted key: (old value, new value)}, the values as JSON texts.
  """
  old_values = _flatten(old)
  new_values = _flatten(new)
  changes = {}
  for key in sorted({**old_values, **new_values}):
    old_value = old_values.get(key, _MISSING)
    new_value = new_values.get(key, _MISSING)
    if old_value != new_value:
      changes[key] = (old_value, new_value)
  return changes


def fixed(config: dict, may_differ: Sequence[str]) -> dict[str, str]:
  """Returns the values of a config that every start of a run has, as JSON texts by dotted key.

  Args:
    config: Nested dict of JSON values.
    may_differ: See `write_or_check`.
  """
  values = _flatten(config)
  return {
    key: text for key, text in values.items() if not _is_under(key, may_differ)
  }


def agree(old: dict, new: dict, may_differ: Sequence[str]) -> bool:
  """Returns whether two configs differ only in keys that may; see `write_or_check`."""
  return all(_is_under(key, may_differ) for key in differences(old, new))


def _flatten(config: dict) -> dict[str, str]:
  """Returns {dotted key: JSON text} of the leaves; a list or an empty dict is a leaf."""
  leaves = {}
  for key, value in config.items():
    if isinstance(value, dict) and value:
      for inner_key, text in _flatten(value).items():
        leaves[f"{key}.{inner_key}"] = text
    else:
      leaves[key] = json.dumps(value)
  return leaves


def _is_under(key: str, prefixes: Sequence[str]) -> bool:
  """Returns whether a dotted key is one of the prefixes or below one."""
  return any(
    fnmatch.fnmatchcase(key, prefix) or fnmatch.fnmatchcase(key, f"{prefix}.*")
    for prefix in prefixes
  )

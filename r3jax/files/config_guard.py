"""Keeps a run's configuration beside its results and refuses to resume it with another one."""

from collections.abc import Sequence
import json
from typing import Any
import uuid

from absl import logging
from etils import epath
import jax

from r3jax.files import atomic

_MISSING = "<missing>"


def check_writable(workdir: epath.PathLike) -> None:
  """Makes the folder and writes a probe, so that a run fails before its hours and not after.

  Raises:
    ValueError: if the folder cannot be made or written.
  """
  probe = epath.Path(workdir) / f".probe-{uuid.uuid4().hex}"
  try:
    probe.parent.mkdir(parents=True, exist_ok=True)
    probe.write_text("")
    probe.unlink()
  except OSError as error:
    raise ValueError(
      f"workdir must be a writable folder, got {str(workdir)!r}: {error}"
    ) from error


def write_or_check(
  workdir: epath.PathLike, config: dict, may_differ: Sequence[str]
) -> None:
  """Writes workdir/config.json on the first run; checks a later run against it.

  Every process checks; process 0 writes, and keeps the file up to date with allowed changes.

  Args:
    workdir: the run's folder.
    config: nested dict of JSON values (ConfigDict.to_dict()).
    may_differ: dotted prefixes of keys that do not change what is computed at a step, for example
      "mesh", "log", "total_steps".

  Raises:
    ValueError: if another key differs, with the values of both runs.
  """
  path = epath.Path(workdir) / "config.json"
  # As it will be read: tuples are lists.
  config = json.loads(json.dumps(config))
  if path.exists():
    changes = differences(json.loads(path.read_text()), config)
    refused = {
      key: pair
      for key, pair in changes.items()
      if not _is_under(key, may_differ)
    }
    if refused:
      lines = [
        f"  {key}: {old} there, {new} now"
        for key, (old, new) in refused.items()
      ]
      raise ValueError(
        f"{path} must agree with the configuration of a run that resumes there, but these keys "
        "differ (set them back, or use another workdir):\n" + "\n".join(lines)
      )
    for key, (old, new) in changes.items():
      logging.info("config %s was %s, is now %s", key, old, new)
  if jax.process_index() == 0:
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    atomic.write_text(path, text)


def differences(old: dict, new: dict) -> dict[str, tuple[str, str]]:
  """Returns {dotted key: (old value, new value)} as JSON texts, of the keys that differ; configs as JSON gives them back."""
  old, new = _flatten(old), _flatten(new)
  pairs = {
    key: (old.get(key, _MISSING), new.get(key, _MISSING))
    for key in sorted({**old, **new})
  }
  return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _flatten(tree: Any, prefix: str = "") -> dict[str, str]:
  """Returns {dotted key: JSON text} of the leaves; a list or an empty dict is a leaf."""
  if not isinstance(tree, dict) or not tree:
    return {prefix: json.dumps(tree)}
  leaves = {}
  for key, value in tree.items():
    leaves |= _flatten(value, f"{prefix}.{key}" if prefix else key)
  return leaves


def _is_under(key: str, prefixes: Sequence[str]) -> bool:
  return any(
    key == prefix or key.startswith(prefix + ".") for prefix in prefixes
  )

"""Keeps logs as JSON lines that end, after a restart, as if the run had never stopped.

Every line is an object with a "step". A resumed run drops the lines of the steps it repeats.
"""

from collections.abc import Iterable
import json

from etils import epath


def append(path: epath.PathLike, objects: Iterable[dict]) -> None:
  """Appends one line an object; the lines are on disk when it returns.

  Object stores cannot append: there (a path with "://") the file is written anew.

  Raises:
    ValueError: if an object holds NaN or an infinity, which JSON does not have.
  """
  path = epath.Path(path)
  lines = "".join(json.dumps(obj, allow_nan=False) + "\n" for obj in objects)
  if "://" in str(path):
    path.write_text((path.read_text() if path.exists() else "") + lines)
    return
  with path.open("a") as file:
    file.write(lines)


def read(path: epath.PathLike) -> list[dict]:
  """Returns the objects of a file, none if there is no file.

  A last line without its end was cut off by a crash and is left out.

  Raises:
    ValueError: if another line is not JSON.
  """
  path = epath.Path(path)
  if not path.exists():
    return []
  *lines, _ = path.read_text().split("\n")
  return [json.loads(line) for line in lines]


def drop_after(path: epath.PathLike, step: int | None) -> None:
  """Drops the lines of later steps than `step` (all lines if None), and a cut-off last line.

  The file is replaced in one go: a crash leaves either the old or the new one.
  """
  path = epath.Path(path)
  if not path.exists():
    return
  kept = [] if step is None else [obj for obj in read(path) if obj["step"] <= step]
  new = path.parent / f"{path.name}.new"
  new.write_text("".join(json.dumps(obj) + "\n" for obj in kept))
  new.replace(path)

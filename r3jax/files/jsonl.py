"""Keeps logs as JSON lines that end, after a restart, as if the run had never stopped.

Every line is an object with a "step", and steps do not decrease. A resumed run drops the lines of the
steps it repeats.

A log is a file, PATH. Object stores cannot append to one, and writing it anew at every line would be
quadratic: there (a path with "://") every append is a small file of its own, PATH.parts/STEP.NUMBER.jsonl,
written once. Reading takes both kinds wherever they are, so that a run may be copied between the two.
"""

from collections.abc import Iterable
from concurrent import futures
import itertools
import json

from etils import epath

from r3jax.files import atomic

_READERS = 16  # files of a store that are read at a time: each is a request


def append(path: epath.PathLike, objects: Iterable[dict]) -> None:
  """Appends one line an object; the lines are on disk when it returns.

  Raises:
    ValueError: if an object holds NaN or an infinity, which JSON does not have.
  """
  path, lines = (
    epath.Path(path),
    [(obj["step"], json.dumps(obj, allow_nan=False) + "\n") for obj in objects],
  )
  if "://" not in str(path):
    with path.open("a") as file:
      file.write("".join(line for _, line in lines))
    return
  for step, group in itertools.groupby(lines, lambda item: item[0]):
    _free_part(path, step).write_text("".join(line for _, line in group))


def read(path: epath.PathLike) -> list[dict]:
  """Returns the objects of a log in the order of their steps, none if there is no log.

  A last line without its end was cut off by a crash and is left out.

  Raises:
    ValueError: if another line is not JSON.
  """
  path = epath.Path(path)
  with futures.ThreadPoolExecutor(_READERS) as pool:
    files = [*_whole(path), *pool.map(_objects, _parts(path))]
  return sorted(
    itertools.chain.from_iterable(files), key=lambda obj: obj["step"]
  )


def drop_after(path: epath.PathLike, step: int | None) -> None:
  """Drops the lines of later steps than `step` (all lines if None), and a cut-off last line.

  The file is replaced in one go: a crash leaves either the old or the new one. Parts are removed.
  """
  path = epath.Path(path)
  for part in _parts(path):
    if step is None or _step(part) > step:
      part.unlink()
  for objects in _whole(path):
    kept = (
      [] if step is None else [obj for obj in objects if obj["step"] <= step]
    )
    atomic.write_text(path, "".join(json.dumps(obj) + "\n" for obj in kept))


def drop_cut_off(path: epath.PathLike) -> None:
  """Drops a last line that was cut off, if there is one; so that lines may follow."""
  path = epath.Path(path)
  if path.exists() and not (text := path.read_text()).endswith("\n"):
    path.write_text(text[: text.rfind("\n") + 1])


def _objects(path: epath.Path) -> list[dict]:
  """Returns the objects of one file."""
  *lines, _ = path.read_text().split("\n")
  return [json.loads(line) for line in lines]


def _whole(path: epath.Path) -> list[list[dict]]:
  """Returns the objects of the log's own file, in a list that is empty where there is none."""
  return [_objects(path)] if path.exists() else []


def _folder(path: epath.Path) -> epath.Path:
  return path.parent / f"{path.name}.parts"


def _parts(path: epath.Path) -> list[epath.Path]:
  """Returns the parts in the order of their writing."""
  folder = _folder(path)
  return (
    sorted(part for part in folder.iterdir() if part.suffix == ".jsonl")
    if folder.exists()
    else []
  )


def _step(part: epath.Path) -> int:
  return int(part.name.partition(".")[0])


def _free_part(path: epath.Path, step: int) -> epath.Path:
  """Returns the name of a step's next part; mostly it is the step's first."""
  folder = _folder(path)
  folder.mkdir(parents=True, exist_ok=True)
  names = (
    folder / f"{step:08d}.{number:04d}.jsonl" for number in itertools.count()
  )
  return next(name for name in names if not name.exists())

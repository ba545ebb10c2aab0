"""Logs of JSON lines that read, after a restart, as if the run had never stopped.

Every line is an object with a "step", and steps do not decrease. A resumed run
drops the lines of the steps that it repeats.

A log is a file, PATH. Object stores cannot append to a file, and rewriting it
with every line would take quadratic time. In a store (a path with "://") every
append is therefore a small file of its own, PATH.parts/STEP.NUMBER.jsonl,
written once. Reading accepts both kinds everywhere, so that a run can be copied
from a disk to a store and back.
"""

from collections.abc import Iterable
from concurrent import futures
import dataclasses
import itertools
import json
import operator
import re

from absl import logging
from etils import epath

from r3jax.files import atomic
from r3jax.files import damage

# Another name in the folder, such as "00000002.0000 (copy).jsonl", is not ours.
_PART_NAME = re.compile(r"\d{8,}\.\d{4,}\.jsonl")
_NUM_READERS = 16  # files of a store that are read at a time: each is a request


def append(path: epath.PathLike, objects: Iterable[dict]) -> None:
  """Appends one line per object; the lines are on disk when it returns.

  Raises:
    ValueError: An object holds NaN or an infinity, which JSON does not have.
    OSError: The file cannot be written; the error names it.
  """
  path = epath.Path(path)
  # All are formatted before any is written.
  lines_of_step = []
  for step, group in itertools.groupby(objects, operator.itemgetter("step")):
    lines_of_step.append((step, _format(group)))
  if "://" not in str(path):
    try:
      with path.open("a") as file:
        file.write("".join(lines for _, lines in lines_of_step))
    except OSError as error:
      # A write that fails does not say where.
      raise OSError(error.errno, error.strerror, str(path)) from error
    return
  for step, lines in lines_of_step:
    _new_part(path, step).write_text(lines)


def read(path: epath.PathLike) -> list[dict]:
  """Returns the objects of a log in the order of their steps; none if there is no log.

  A last line without its end was cut off by a crash and is left out. Other lines that are no
  objects with a step are left out with a warning.

  Raises:
    ValueError: What lies there is no file.
    OSError: The file cannot be read.
  """
  path = epath.Path(path)
  files = _parts(path)
  if path.exists():
    files.insert(0, path)
  with futures.ThreadPoolExecutor(_NUM_READERS) as pool:
    contents = list(pool.map(_read_file, files))
  objects = []
  for content in contents:
    objects += content.objects
  return sorted(objects, key=operator.itemgetter("step"))


def drop_after(path: epath.PathLike, step: int | None) -> None:
  """Drops the lines of later steps than `step` (all lines if None), and a cut-off last line.

  The file is replaced atomically: a crash leaves either the old or the new one.
  Parts are removed. A file with damaged lines is copied to PATH.damaged first.
  """
  path = epath.Path(path)
  for part in _parts(path):
    if step is None or _step_of(part) > step:
      part.unlink()
  if not path.exists():
    return
  content = _read_file(path)
  if content.is_damaged:
    copy = path.parent / f"{path.name}.damaged"
    atomic.write_bytes(copy, path.read_bytes())
    logging.warning("%s is kept as it was in %s", path, copy)
  remaining = []
  if step is not None:
    remaining = [obj for obj in content.objects if obj["step"] <= step]
  atomic.write_text(path, _format(remaining))


def drop_cut_off(path: epath.PathLike) -> None:
  """Drops a last line that was cut off, if there is one, so that lines can be appended.

  The file is replaced atomically: a crash leaves either the old or the new one.
  """
  path = epath.Path(path)
  if not path.exists():
    return
  content = path.read_bytes()
  if not content.endswith(b"\n"):
    atomic.write_bytes(path, content[: content.rfind(b"\n") + 1])


def _format(objects: Iterable[dict]) -> str:
  """Returns one line per object."""
  return "".join(json.dumps(obj, allow_nan=False) + "\n" for obj in objects)


@dataclasses.dataclass(frozen=True)
class _Content:
  """What a file holds.

  Attributes:
    objects: Its objects in their order.
    is_damaged: Whether other lines than a cut-off last one were left out.
  """

  objects: list[dict]
  is_damaged: bool


def _read_file(path: epath.Path) -> _Content:
  """Reads a file; what follows the last line end was cut off."""
  *lines, _ = damage.read_bytes(path).split(b"\n")
  objects = []
  damaged = []
  for number, line in enumerate(lines, start=1):
    try:
      # With NaN it could not be written again; `append` refuses it, too.
      values = damage.parse_object(line, allow_nan=False)
    except (ValueError, RecursionError):
      values = {}
    if type(values.get("step")) is int:
      objects.append(values)
    else:
      damaged.append(number)
  if damaged:
    logging.warning(
      "%s: %d of %d lines are no JSON objects with a step and are left out, the first is line %d",
      path,
      len(damaged),
      len(lines),
      damaged[0],
    )
  return _Content(objects, bool(damaged))


def _parts_folder(path: epath.Path) -> epath.Path:
  return path.parent / f"{path.name}.parts"


def _parts(path: epath.Path) -> list[epath.Path]:
  """Returns the parts of a log in the order in which they were written."""
  folder = _parts_folder(path)
  if not folder.exists():
    return []
  return sorted(
    part for part in folder.iterdir() if _PART_NAME.fullmatch(part.name)
  )


def _step_of(part: epath.Path) -> int:
  return int(part.name.partition(".")[0])


def _new_part(path: epath.Path, step: int) -> epath.Path:
  """Returns the path of a step's next part; mostly it is the step's first."""
  folder = _parts_folder(path)
  folder.mkdir(parents=True, exist_ok=True)
  for number in itertools.count():
    part = folder / f"{step:08d}.{number:04d}.jsonl"
    if not part.exists():
      return part

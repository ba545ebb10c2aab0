"""Damages of files and folders, drawn from a seed; a good reader gets over or refuses every one."""

from collections.abc import Callable
import json
import os
import pathlib
import random
import shutil

Damage = Callable[[pathlib.Path, random.Random], None]


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
  return sorted(path for path in folder.rglob("*") if path.is_file())


def _any_file(folder: pathlib.Path, rng: random.Random) -> pathlib.Path:
  return rng.choice(_files(folder))


def _large_file(folder: pathlib.Path, rng: random.Random) -> pathlib.Path:
  """Returns one of the files that hold most of the bytes."""
  files = _files(folder)
  sizes = [path.stat().st_size for path in files]
  return rng.choices(files, sizes)[0]


def _json_file(folder: pathlib.Path, rng: random.Random) -> pathlib.Path:
  files = [p for p in _files(folder) if p.read_bytes()[:1] in (b"{", b"[")]
  return rng.choice(files)


def flip_in_data(folder: pathlib.Path, rng: random.Random) -> None:
  """Flips a bit of a file, the likelier the larger it is."""
  _flip(_large_file(folder, rng), rng)


def flip_in_any(folder: pathlib.Path, rng: random.Random) -> None:
  """Flips a bit of any file."""
  _flip(_any_file(folder, rng), rng)


def _flip(path: pathlib.Path, rng: random.Random) -> None:
  content = bytearray(path.read_bytes())
  if not content:
    content = bytearray(1)
  content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
  path.write_bytes(content)


def cut(folder: pathlib.Path, rng: random.Random) -> None:
  """Cuts the end of a file."""
  path = _large_file(folder, rng)
  os.truncate(path, rng.randrange(path.stat().st_size))


def empty(folder: pathlib.Path, rng: random.Random) -> None:
  """Empties a file."""
  _any_file(folder, rng).write_bytes(b"")


def lengthen(folder: pathlib.Path, rng: random.Random) -> None:
  """Adds bytes to a file."""
  with _any_file(folder, rng).open("ab") as file:
    file.write(rng.randbytes(rng.randrange(1, 64)))


def zero_block(folder: pathlib.Path, rng: random.Random) -> None:
  """Writes zeros over a part of a file, as a disk does that loses a page."""
  path = _large_file(folder, rng)
  content = bytearray(path.read_bytes())
  start = rng.randrange(len(content))
  length = min(4096, len(content) - start)
  content[start : start + length] = bytes(length)
  path.write_bytes(content)


def remove_file(folder: pathlib.Path, rng: random.Random) -> None:
  """Removes a file."""
  _any_file(folder, rng).unlink()


def remove_folder(folder: pathlib.Path, rng: random.Random) -> None:
  """Removes a folder with what is in it, or a file where there is no folder."""
  folders = sorted(path for path in folder.rglob("*") if path.is_dir())
  if folders:
    shutil.rmtree(rng.choice(folders))
  else:
    remove_file(folder, rng)


def wrong_json(folder: pathlib.Path, rng: random.Random) -> None:
  """Puts another JSON value, or none, into a JSON file."""
  texts = ("", "{}", "[]", "null", "{", '{"a": 1e999}', "[" * 5000, "\xff")
  path = _json_file(folder, rng)
  path.write_bytes(rng.choice(texts).encode("latin-1"))


def changed_json(folder: pathlib.Path, rng: random.Random) -> None:
  """Changes a value of a JSON object."""
  path = _json_file(folder, rng)
  try:
    content = json.loads(path.read_text())
  except ValueError:
    _flip(path, rng)
    return
  values = (None, -1, 0, 10**9, 10**30, "x", [], {}, 1.5, True)
  if isinstance(content, dict) and content:
    content[rng.choice(sorted(content))] = rng.choice(values)
  path.write_text(json.dumps(content))


def pipe(folder: pathlib.Path, rng: random.Random) -> None:
  """Puts a FIFO in the place of a file."""
  path = _any_file(folder, rng)
  path.unlink()
  os.mkfifo(path)


def link_to_nothing(folder: pathlib.Path, rng: random.Random) -> None:
  """Puts a link to nothing in the place of a file."""
  path = _any_file(folder, rng)
  path.unlink()
  path.symlink_to(folder / "nowhere")


def folder_for_file(folder: pathlib.Path, rng: random.Random) -> None:
  """Puts a folder in the place of a file."""
  path = _any_file(folder, rng)
  path.unlink()
  path.mkdir()


def other_file(folder: pathlib.Path, rng: random.Random) -> None:
  """Puts the content of another file of the same folder into a file."""
  first, second = rng.sample(_files(folder), 2)
  first.write_bytes(second.read_bytes())


DAMAGES: tuple[Damage, ...] = (
  flip_in_data,
  flip_in_data,
  flip_in_data,
  flip_in_any,
  flip_in_any,
  cut,
  empty,
  lengthen,
  zero_block,
  remove_file,
  remove_folder,
  wrong_json,
  changed_json,
  pipe,
  link_to_nothing,
  folder_for_file,
  other_file,
)

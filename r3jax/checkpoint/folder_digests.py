"""Writes the digests of a model's files beside them, and compares the files with them.

Every file is hashed in blocks, so that threads and processes share the reading of a large one.
"""

from collections.abc import Iterable
from concurrent import futures
import functools
import hashlib
import json
import os
from typing import Any

from etils import epath

from r3jax.checkpoint import safetensors_files
from r3jax.checkpoint import verification
from r3jax.files import atomic
from r3jax.files import bounded

FILE = "digests.json"
_VERSION = 1
_BLOCK_BYTES = 16 << 20
_HEX_DIGITS = 16
_THREADS = min(8, os.cpu_count() or 1)


def write(folder: epath.Path, names: Iterable[str]) -> None:
  """Reads files of a folder and writes `digests.json`.

  Args:
    folder: Folder of a model.
    names: Names of files; a name of a folder stands for all files in it.
  """
  files = {}
  for name in sorted(_files_of(folder, names)):
    size = _size(folder / name)
    blocks = [_digest(folder / name, i) for i in range(_num_blocks(size))]
    files[name] = {"size": size, "blocks": blocks}
  content = {"version": _VERSION, "block_bytes": _BLOCK_BYTES, "files": files}
  content["check"] = verification.hash_of_json(content)
  atomic.write_text(folder / FILE, json.dumps(content, indent=1) + "\n")


def check(
  folder: epath.Path, are_weights: bool, share: tuple[int, int] = (0, 1)
) -> bool:
  """Compares the files of a model with their digests.

  Args:
    folder: Folder of a model.
    are_weights: Whether the weights are compared, or all other files.
    share: (k, n): only every n-th block is read, from the k-th on.

  Returns:
    Whether there are digests.

  Raises:
    ValueError: A file is missing, cut or changed.
  """
  path = folder / FILE
  if not path.exists():
    return False
  files = _read(path)
  blocks = []
  for name, fields in files.items():
    if is_of_weights(name) != are_weights:
      continue
    file = folder / name
    if not file.is_file():
      raise ValueError(f"the model {folder} is damaged: {name} is missing")
    if _size(file) != fields["size"]:
      raise ValueError(
        f"the model {folder} is damaged: {name} has {_size(file)} bytes, not {fields['size']}"
      )
    for number, digest in enumerate(fields["blocks"]):
      blocks.append((name, number, digest))
  blocks = blocks[share[0] :: share[1]]

  def is_same(block: tuple[str, int, str]) -> bool:
    name, number, digest = block
    return _digest(folder / name, number) == digest

  with futures.ThreadPoolExecutor(_THREADS) as pool:
    for block, same in zip(blocks, pool.map(is_same, blocks), strict=True):
      if not same:
        pool.shutdown(cancel_futures=True)
        raise ValueError(
          f"the model {folder} is damaged: {block[0]} has changed since {FILE} was written. Copy "
          f"it again; or, if the change is meant, delete {FILE} to load what cannot be verified"
        )
  return True


@functools.lru_cache(maxsize=64)
def check_weights_once(
  folder: epath.Path, share: tuple[int, int], file_times: tuple[Any, ...]
) -> bool:
  """Compares the weights as `check` does, but only once while no file changes."""
  del file_times
  return check(folder, are_weights=True, share=share)


def is_of_weights(name: str) -> bool:
  """Returns whether a file holds weights, by its name in the folder of a model."""
  return name.endswith(".safetensors") or "/" in name


def _files_of(folder: epath.Path, names: Iterable[str]) -> set[str]:
  """Returns the names of the files that are there, with those in folders."""
  files = set()
  for name in names:
    path = folder / name
    if path.is_dir():
      children = [f"{name}/{child.name}" for child in path.iterdir()]
      files |= _files_of(folder, children)
    elif path.is_file():
      files.add(name)
  return files


def _read(path: epath.Path) -> dict[str, dict]:
  """Returns size and blocks by the name of the file."""
  problem = f"{path} must be what r3jax wrote; delete it to load what cannot be verified"
  if not path.is_file():
    raise ValueError(problem)
  try:
    content = bounded.read_json_object(path)
    check_value = content.pop("check")
  except (ValueError, KeyError) as error:
    raise ValueError(problem) from error
  if check_value != verification.hash_of_json(content):
    raise ValueError(problem)
  version = (content.get("version"), content.get("block_bytes"))
  if version != (_VERSION, _BLOCK_BYTES):
    raise ValueError(f"{path} is of a newer r3jax, which must read it")
  files = content.get("files")
  if not _are_files(files):
    raise ValueError(problem)
  return files


def _are_files(files: object) -> bool:
  """Returns whether a value is size and blocks by the name of a file in the folder."""
  if not isinstance(files, dict):
    return False
  for name, fields in files.items():
    parts = name.split("/")
    # No path that leads out of the folder.
    if not all(part.strip(".") for part in parts):
      return False
    if not isinstance(fields, dict) or fields.keys() != {"size", "blocks"}:
      return False
    if type(fields["size"]) is not int or not isinstance(
      fields["blocks"], list
    ):
      return False
  return True


def _num_blocks(size: int) -> int:
  return max(1, -(-size // _BLOCK_BYTES))


def _size(path: epath.Path) -> int:
  with bounded.open_file(path) as file:
    return safetensors_files.file_size(file)


def _digest(path: epath.Path, number: int) -> str:
  """Returns the digest of a block of a file."""
  with bounded.open_file(path) as file:
    file.seek(number * _BLOCK_BYTES)
    content = file.read(_BLOCK_BYTES)
  return hashlib.sha256(content).hexdigest()[:_HEX_DIGITS]

"""Identifies files of weights without reading all of them."""

from collections.abc import Iterable
import hashlib

from etils import epath

from r3jax.checkpoint import safetensors_files
from r3jax.files import bounded

_NUM_BLOCKS = 64
_BLOCK_BYTES = 4096


def of_files(paths: Iterable[epath.Path]) -> str:
  """Returns 16 hex digits that identify files of weights.

  The hash covers the name and the size of every file, and 64 blocks of 4 kB spread over it. Files
  of the same sizes with other weights very likely differ in it, and even those of a large model
  take no time.

  Args:
    paths: Files in an order that does not depend on where their folders are.
  """
  digest = hashlib.sha256()
  for path in paths:
    with bounded.open_file(path) as file:
      size = safetensors_files.file_size(file)
      digest.update(f"{path.name} {size}\n".encode())
      last_start = max(0, size - _BLOCK_BYTES)
      for i in range(_NUM_BLOCKS):
        file.seek(last_start * i // (_NUM_BLOCKS - 1))
        digest.update(file.read(_BLOCK_BYTES))
  return digest.hexdigest()[:16]

"""Writes files whole or not at all, on disks and in buckets."""

from collections.abc import Iterator
import contextlib
import uuid

from etils import epath


@contextlib.contextmanager
def replacing(
  path: epath.PathLike, shared: bool = False
) -> Iterator[epath.Path]:
  """Yields a path to write to; its file replaces `path` when the block ends.

  If the block raises or the process is killed, `path` is as it was before,
  and an unfinished file may stay beside it.

  Args:
    path: File to write; its folder exists.
    shared: Whether several processes may write `path` at the same time. Each
      then writes to a name of its own, and the last one to finish wins.
      Otherwise the name is fixed, so that the next attempt overwrites what a
      killed process has left.
  """
  path = epath.Path(path)
  name = f"{path.name}.partial"
  if shared:
    name = f"{path.name}.{uuid.uuid4().hex}.partial"
  partial = path.parent / name
  yield partial
  partial.replace(path)


def check_writable(folder: epath.PathLike) -> None:
  """Makes a folder and writes a probe, which is removed.

  Raises:
    OSError: The folder cannot be made or written.
  """
  probe = epath.Path(folder) / f".probe-{uuid.uuid4().hex}"
  probe.parent.mkdir(parents=True, exist_ok=True)
  probe.write_text("")
  probe.unlink()


def write_text(path: epath.PathLike, text: str) -> None:
  """Writes a text file whole or not at all."""
  with replacing(path) as partial:
    partial.write_text(text)


def write_bytes(
  path: epath.PathLike, content: bytes, shared: bool = False
) -> None:
  """Writes a binary file whole or not at all; see `replacing` for `shared`."""
  with replacing(path, shared) as partial:
    partial.write_bytes(content)

"""Prompt records as TFDS data: prepared once under a lock, read without TensorFlow."""

from collections.abc import Iterable, Iterator
import contextlib
import fcntl
import hashlib
import json
import os
import pathlib

import tensorflow_datasets as tfds

# The format that TFDS writes and reads without TensorFlow.
FILE_FORMAT = "array_record"


class RecordBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Holds prompt records, one JSON text an example; a subclass says which are in its splits."""

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=self.__doc__,
      features=tfds.features.FeaturesDict({"record": tfds.features.Text()}),
      disable_shuffling=True,
    )

  def _generate_examples(
    self, records: Iterable[dict]
  ) -> Iterator[tuple[int, dict]]:
    for key, record in enumerate(records):
      yield key, {"record": json.dumps(record)}


def root(data_dir: str | os.PathLike | None) -> pathlib.Path:
  """Returns where prepared data is kept: `data_dir`, else $R3JAX_DATA, else ~/.cache/r3jax."""
  return pathlib.Path(
    data_dir
    or os.environ.get("R3JAX_DATA")
    or os.path.expanduser("~/.cache/r3jax")
  )


def folder_name(content: object) -> str:
  """Returns 12 hex digits of a hash of a JSON value: where data made of it is kept."""
  return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def downloads(data_dir: pathlib.Path) -> pathlib.Path:
  """Returns the folder of what was downloaded for data prepared in `data_dir`."""
  return data_dir / "downloads"


def read(
  builder_class: type[RecordBuilder],
  data_dir: pathlib.Path,
  name: str,
  split: str,
  **arguments,
) -> list[dict]:
  """Returns the records of a split in the order they were written, preparing them on first use.

  Processes that need the data at once wait for the first one's lock.

  Args:
    builder_class: makes the data.
    data_dir: the root, see `root`.
    name: the folder in `data_dir`, see `folder_name`: data of other content is prepared anew and
      never read stale.
    split: the split.
    **arguments: what the builder takes beside data_dir and file_format.
  """
  folder = data_dir / name
  # Around the builder too: it looks only once for prepared data.
  with locked(folder):
    builder = builder_class(
      data_dir=os.fspath(folder), file_format=FILE_FORMAT, **arguments
    )
    builder.download_and_prepare(download_dir=os.fspath(downloads(data_dir)))
  source = builder.as_data_source(split=split)
  return [json.loads(source[index]["record"]) for index in range(len(source))]


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
  """Holds the folder's lock: of processes that write it at once, one does and the others wait."""
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / "lock").open("w") as lock:
    # Released when the file is closed, or the process dies.
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield

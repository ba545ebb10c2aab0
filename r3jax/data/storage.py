"""Prompts as TFDS data: prepared once under a lock, read without TensorFlow."""

from collections.abc import Callable, Iterable, Iterator
import contextlib
import fcntl
import hashlib
import io
import json
import os
import pathlib

from absl import logging
from google.protobuf import json_format
import tensorflow_datasets as tfds

from r3jax.data import records
from r3jax.files import caches
from r3jax.files import damage

# The format that TFDS writes and reads without TensorFlow.
FILE_FORMAT = "array_record"
VARIABLE = "R3JAX_DATA"  # of the environment: names the folder of prepared data
# What TFDS and its readers raise where prepared data is missing a part, cut or changed.
_OF_DAMAGE = (RuntimeError, AssertionError, KeyError, json_format.ParseError)


class PromptBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Holds prompts, one JSON text an example; a subclass generates the prompts of its splits."""

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=self.__doc__,
      features=tfds.features.FeaturesDict({"record": tfds.features.Text()}),
      # The order of the prompts is part of a run's identity.
      disable_shuffling=True,
    )

  def _generate_examples(
    self, prompts: Iterable[records.Prompt]
  ) -> Iterator[tuple[int, dict]]:
    for key, prompt in enumerate(prompts):
      yield key, {"record": json.dumps(prompt.to_json())}


def root(data_dir: str | os.PathLike | None) -> pathlib.Path | None:
  """Returns the folder of prepared data, made if needed; None where nothing can be kept.

  It is `data_dir`, else $R3JAX_DATA, else ~/.cache/r3jax.
  """
  folder = caches.folder(VARIABLE)
  if data_dir:
    folder = caches.usable(os.fspath(data_dir), VARIABLE)
  return pathlib.Path(folder) if folder else None


def folder_name(content: object) -> str:
  """Returns 12 hex digits of a hash of a JSON value, the folder of data prepared from it."""
  return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def downloads(data_dir: pathlib.Path | None) -> pathlib.Path | None:
  """Returns the folder of downloads for data prepared in `data_dir`; None for None."""
  return data_dir / "downloads" if data_dir else None


def read(
  builder_class: type[PromptBuilder],
  data_dir: pathlib.Path | None,
  name: str,
  split: str,
  make: Callable[[], list[records.Prompt]],
  **arguments,
) -> list[records.Prompt]:
  """Returns the prompts of a split in the order they were written, preparing them on first use.

  Processes that need the data at once wait for the first one's lock. A folder that is damaged is
  left alone, with a warning, and the prompts are made without it.

  Args:
    builder_class: prepares the data.
    data_dir: the root, see `root`.
    name: the folder in `data_dir`, see `folder_name`: changed content has another name, so that it
      is prepared anew and never read stale.
    split: the name of the split.
    make: returns the prompts where no folder has them.
    **arguments: further arguments of the builder, beside data_dir and file_format.
  """
  if data_dir is None:
    return make()
  try:
    return _read_prepared(builder_class, data_dir, name, split, **arguments)
  except _OF_DAMAGE as error:
    logging.warning(
      "%s is damaged and is not used: %s. Delete it to have it made again",
      data_dir / name,
      damage.reason(error),
    )
    return make()
  except OSError as error:  # a full disk
    logging.warning(
      "prompts are not kept for the next start: %s (%s names another folder)",
      error,
      VARIABLE,
    )
    return make()


def _read_prepared(
  builder_class: type[PromptBuilder],
  data_dir: pathlib.Path,
  name: str,
  split: str,
  **arguments,
) -> list[records.Prompt]:
  """Returns the prompts of prepared data; for the arguments see `read`."""
  folder = data_dir / name
  # The builder looks for prepared data only once, when it is made: it needs the lock, too.
  with locked(folder):
    builder = builder_class(
      data_dir=os.fspath(folder), file_format=FILE_FORMAT, **arguments
    )
    # What TFDS prints and its bars say nothing to a user of these few kilobytes.
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
      builder.download_and_prepare(download_dir=os.fspath(downloads(data_dir)))
  source = builder.as_data_source(split=split)
  texts = [source[index]["record"] for index in range(len(source))]
  return [records.Prompt.from_json(json.loads(text)) for text in texts]


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
  """Holds the folder's lock: one of several processes writes it and the others wait."""
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / "lock").open("w") as lock:
    # The lock is released when the file is closed or the process ends.
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield

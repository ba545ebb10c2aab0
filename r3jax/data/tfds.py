"""TFDS builders of the benchmarks' prompt files, which users fetch themselves (NOTICE.md)."""

from collections.abc import Collection
import hashlib
import pathlib

import tensorflow_datasets as tfds

from r3jax.data import benchmarks
from r3jax.data import records
from r3jax.data import sources
from r3jax.data import storage

# A builder holds one file, whatever it is used for.
SPLIT = "prompts"


def _parse(
  content: bytes, source: str, tags: Collection[str] | None
) -> list[records.Prompt]:
  """Returns the prompts of a file's content; raises a ValueError where there is none."""
  prompts = records.parse(content, source, records.Reading(tags))
  if not prompts:
    raise ValueError(f"{source} must hold at least one prompt; there is none")
  return prompts


class PromptFile(storage.PromptBuilder):
  """Holds the prompts of one file, one JSON text an example."""

  # 1.1.0: a record may have an inscription.
  VERSION = tfds.core.Version("1.1.0")

  def __init__(
    self,
    *,
    source: str,
    tags: Collection[str] | None = None,
    file_format: str = storage.FILE_FORMAT,
    **arguments,
  ):
    """Creates the builder.

    Args:
      source: a file of prompts, a path or a URL, see `sources.read`.
      tags: the tags that may occur; if None, those of the benchmark that has the builder's name.
      file_format: the format of the prepared files, one of TFDS's.
      **arguments: the arguments of every TFDS builder, for example data_dir.
    """
    self._source = source
    self._tags = tags
    if tags is None:
      self._tags = benchmarks.BENCHMARKS[self.name].tags
    super().__init__(file_format=file_format, **arguments)
    # TFDS creates a builder anew from these arguments when it unpickles it.
    self._original_state |= {"source": source, "tags": tags}

  def _split_generators(
    self, dl_manager: tfds.download.DownloadManager
  ) -> dict:
    content = sources.read(self._source, pathlib.Path(dl_manager.download_dir))
    prompts = _parse(content, self._source, self._tags)
    return {SPLIT: self._generate_examples(prompts)}


class Geneval(PromptFile):
  """Prompts of GenEval, one JSON text an example."""


class GenevalPlus(PromptFile):
  """Prompts of GenEval++, one JSON text an example."""


class Tiif(PromptFile):
  """Prompts of TIIF-Bench with their questions, one JSON text an example."""


class Ocr(PromptFile):
  """Prompts with the text that is written in the image, one JSON text an example."""


# Benchmarks of users are read with `PromptFile`.
BUILDERS = {
  builder.name: builder for builder in (Geneval, GenevalPlus, Tiif, Ocr)
}


def load(
  benchmark: benchmarks.Benchmark, source: str, data_dir: str | None = None
) -> list[records.Prompt]:
  """Returns the prompts of a file in its order, preparing the data on first use.

  Where no folder can keep prepared data, the file is parsed every time.

  Args:
    benchmark: gives the tags that may occur.
    source: a file of prompts, a path or a URL, see `sources.read`.
    data_dir: the folder of downloads and prepared data; $R3JAX_DATA or ~/.cache/r3jax if None.

  Raises:
    ValueError: the content is not the expected one, or a record is invalid, see `sources.read` and
      `records.parse`.
    OSError: the source cannot be read.
  """
  # The content decides the folder, not the source: a changed file is prepared anew, and a file with
  # another name is not.
  data_root = storage.root(data_dir)
  content = sources.read(source, storage.downloads(data_root))
  builder_class = BUILDERS.get(benchmark.name, PromptFile)
  identity = [
    benchmark.name,
    hashlib.sha256(content).hexdigest(),
    str(builder_class.VERSION),
  ]
  if builder_class is PromptFile:
    identity += benchmark.tags  # they may change without a new version

  def parse() -> list[records.Prompt]:
    return _parse(content, source, benchmark.tags)

  return storage.read(
    builder_class,
    data_root,
    storage.folder_name(identity),
    SPLIT,
    parse,
    source=source,
    tags=benchmark.tags,
  )

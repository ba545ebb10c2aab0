"""TFDS builders of the benchmarks' prompt files, which users fetch themselves (NOTICE.md)."""

import hashlib
import pathlib

import tensorflow_datasets as tfds

from r3jax.data import benchmarks
from r3jax.data import records as records_lib
from r3jax.data import sources
from r3jax.data import storage

SPLIT = "prompts"  # A builder holds one file, of whatever use.


class _PromptFile(storage.RecordBuilder, skip_registration=True):
  """Holds the records of one prompt file of the benchmark that has the builder's name."""

  VERSION = tfds.core.Version("1.0.0")

  def __init__(
    self, *, source: str, file_format: str = storage.FILE_FORMAT, **arguments
  ):
    """Makes the builder.

    Args:
      source: a file of JSON lines: a path or a URL, see `sources.read`.
      file_format: as TFDS takes it.
      **arguments: what every TFDS builder takes: data_dir and others.
    """
    self._source = source
    super().__init__(file_format=file_format, **arguments)
    # What TFDS makes the builder of when it is unpickled.
    self._original_state["source"] = source

  def _split_generators(
    self, dl_manager: tfds.download.DownloadManager
  ) -> dict:
    content = sources.read(self._source, pathlib.Path(dl_manager.download_dir))
    records = records_lib.parse_jsonl(
      content, self._source, benchmarks.BENCHMARKS[self.name].tags
    )
    if not records:
      raise ValueError(
        f"{self._source} must hold at least one prompt; there is none"
      )
    return {
      SPLIT: self._generate_examples(record.to_json() for record in records)
    }


class Geneval(_PromptFile):
  """Prompts of GenEval, one JSON text an example."""


class GenevalPlus(_PromptFile):
  """Prompts of GenEval++, one JSON text an example."""


class Tiif(_PromptFile):
  """Prompts of TIIF-Bench with their questions, one JSON text an example."""


BUILDERS = {builder.name: builder for builder in (Geneval, GenevalPlus, Tiif)}


def load(
  benchmark: str, source: str, data_dir: str | None = None
) -> list[dict]:
  """Returns the valid records of a prompt file in its order, preparing the data on first use.

  Args:
    benchmark: "geneval", "geneval_plus" or "tiif".
    source: a file of JSON lines: a path or a URL, see `sources.read`.
    data_dir: where downloads and prepared data are kept; $R3JAX_DATA or ~/.cache/r3jax if None.

  Returns:
    What `PromptRecord.to_json` gives.

  Raises:
    ValueError: if there is no such benchmark, the content is not the expected one, or a record is
      invalid, see `sources.read` and `prompts.parse_jsonl`.
    OSError: if the source cannot be read.
  """
  if benchmark not in BUILDERS:
    raise ValueError(
      f"benchmark must be one of {sorted(BUILDERS)}, got {benchmark!r}"
    )
  builder_class, root = BUILDERS[benchmark], storage.root(data_dir)
  content = sources.read(source, storage.downloads(root))
  version = str(builder_class.VERSION)
  name = storage.folder_name(
    [benchmark, hashlib.sha256(content).hexdigest(), version]
  )
  return storage.read(builder_class, root, name, SPLIT, source=source)

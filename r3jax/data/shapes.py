"""TFDS builder of the embedded world's prompts, read without a TensorFlow graph."""

from collections.abc import Iterator
import contextlib
import fcntl
import hashlib
import json
import os
import pathlib

from r3jax.worlds import prompts as world_prompts
import tensorflow_datasets as tfds

SPLITS = {"train": world_prompts.train_records, "heldout": world_prompts.heldout_records}


class Shapes(tfds.core.GeneratorBasedBuilder):
  """Prompts of the embedded world in GenEval's record format, one JSON text an example."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
        builder=self,
        description=self.__doc__,
        features=tfds.features.FeaturesDict({"record": tfds.features.Text()}),
        disable_shuffling=True,
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
    del dl_manager  # The world is made, not downloaded.
    return {split: _examples(records()) for split, records in SPLITS.items()}

  def _generate_examples(self) -> None:
    raise NotImplementedError("_split_generators gives the examples of each split itself")


def load(data_dir: str | None = None, split: str = "train") -> list[dict]:
  """Returns the records of a split in the order of the world, preparing the data on first use.

  The data lies in a folder named by a hash of the records, so a world that changed is prepared
  anew and never read stale. Processes that need it at once wait for the first one's lock.

  Args:
    data_dir: where prepared data is kept; $R3JAX_DATA or ~/.cache/r3jax if None.
    split: "train" or "heldout".

  Raises:
    ValueError: if there is no such split.
  """
  if split not in SPLITS:
    raise ValueError(f"split must be one of {sorted(SPLITS)}, got {split!r}")
  folder = pathlib.Path(data_dir or _default_data_dir()) / _world_hash()
  with _locked(folder):  # Around the builder too: it looks only once for prepared data.
    builder = Shapes(data_dir=os.fspath(folder), file_format="array_record")
    builder.download_and_prepare()
  source = builder.as_data_source(split=split)
  return [json.loads(source[index]["record"]) for index in range(len(source))]


def _examples(records: list[dict]) -> Iterator[tuple[int, dict]]:
  """Yields (key, example) of each record."""
  for key, record in enumerate(records):
    yield key, {"record": json.dumps(record)}


def _default_data_dir() -> str:
  return os.environ.get("R3JAX_DATA") or os.path.expanduser("~/.cache/r3jax")


def _world_hash() -> str:
  """Returns 12 hex digits of the records of all splits."""
  content = json.dumps({split: records() for split, records in SPLITS.items()})
  return hashlib.sha256(content.encode()).hexdigest()[:12]


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
  """Holds the folder's lock: of processes that prepare at once, one writes and the others wait."""
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / "lock").open("w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)  # Released when the file is closed, or the process dies.
    yield

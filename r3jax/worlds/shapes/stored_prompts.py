"""The prompts of the world as TFDS data, read without a TensorFlow graph."""

import tensorflow_datasets as tfds

from r3jax.data import records
from r3jax.data import storage
from r3jax.worlds.shapes import prompts

SPLITS = {"train": prompts.train_records, "heldout": prompts.heldout_records}


class Shapes(storage.PromptBuilder):
  """Prompts of the embedded world in GenEval's record format, one JSON text an example."""

  VERSION = tfds.core.Version("1.0.0")

  def _split_generators(
    self, dl_manager: tfds.download.DownloadManager
  ) -> dict:
    del dl_manager  # The world is made, not downloaded.
    return {
      split: self._generate_examples(make_prompts())
      for split, make_prompts in SPLITS.items()
    }


def load(
  data_dir: str | None = None, split: str = "train"
) -> list[records.Prompt]:
  """Returns the records of a split in the order of the world, preparing the data on first use.

  A world that changed is prepared anew, see `storage.read`.

  Args:
    data_dir: where prepared data is kept; $R3JAX_DATA or ~/.cache/r3jax if None.
    split: "train" or "heldout".

  Raises:
    ValueError: if there is no such split.
  """
  if split not in SPLITS:
    raise ValueError(f"split must be one of {sorted(SPLITS)}, got {split!r}")
  content = {}
  for name, make_prompts in SPLITS.items():
    content[name] = [prompt.to_json() for prompt in make_prompts()]
  name = storage.folder_name(content)
  data_root = storage.root(data_dir)
  return storage.read(Shapes, data_root, name, split, SPLITS[split])

"""The config to draw with, for a model that comes without one."""

import ml_collections

from r3jax.checkpoint import pretrained
from r3jax.files import config_files
from r3jax.worlds import registry

# Of config.eval: a draft and three revisions at most.
SAMPLING = {"rounds": 4, "seed": 0, "points": 50, "temperature": 0.3}
DEFAULT_WORLD = "shapes"


def variant_of(folder: str) -> str:
  """Returns the config variant of a model: the world whose vocabulary it has, or "bagel".

  Raises:
    ValueError: the model cannot be read.
  """
  vocabulary = pretrained.find(folder).tokenizer.vocabulary
  for name in registry.REGISTERED:
    build_tokenizer = registry.find(name).tokenizer
    if build_tokenizer is None:
      continue
    if build_tokenizer().get_vocab() == vocabulary:
      return name
  return "bagel"


def default(folder: str) -> ml_collections.ConfigDict:
  """Returns a config for a model's folder, that of the shipped model for "".

  Raises:
    ValueError: the model cannot be read.
  """
  variant = variant_of(folder) if folder else DEFAULT_WORLD
  config = config_files.load(f"r3_geneval:{variant}")
  config.eval.update(SAMPLING)
  if folder:
    config.model.folder = folder
  return config

"""Flags of the commands that draw with a model: generate, edit and ask."""

from absl import flags
import ml_collections
from ml_collections import config_flags

from r3jax.cli import command_line
from r3jax.generation import model_config
from r3jax.run import config_rules


def define_model() -> None:
  """Defines the flags that choose the model."""
  flags.DEFINE_string(
    "model",
    None,
    "Folder of the model: in BAGEL's format, converted, or the workdir of a run. Default: the "
    "small one of the package.",
  )
  config_flags.DEFINE_config_file(
    "config",
    None,
    "Config file, to set more than the flags do; its eval.* are then the defaults of the flags. "
    "Default: r3_geneval, with the variant of the world whose vocabulary the model has.",
  )


def define_seed() -> None:
  """Defines --seed, which stands for config.eval.seed."""
  flags.DEFINE_integer("seed", None, "Seed of all randomness. Default: 0.")
  command_line.limit(seed=config_rules.SEED)


def define_points() -> None:
  """Defines --points, which stands for config.eval.points."""
  flags.DEFINE_integer(
    "points", None, "Points of the ODE that draws an image. Default: 50."
  )
  command_line.limit(points=config_rules.POINTS)


def define_temperature() -> None:
  """Defines --temperature, which stands for config.eval.temperature."""
  flags.DEFINE_float("temperature", None, "Temperature of texts. Default: 0.3.")
  command_line.limit(temperature=config_rules.TEMPERATURE)


def define_num_images(meaning: str) -> None:
  """Defines --num_images.

  Args:
    meaning: what is counted.
  """
  flags.DEFINE_integer("num_images", 4, f"Number of {meaning}.")
  command_line.limit(num_images=config_rules.NUM_IMAGES)


def config() -> ml_collections.ConfigDict:
  """Returns the config with the flags in it.

  Raises:
    ValueError: the model cannot be read.
  """
  values = flags.FLAGS
  result = values.config
  if result is None:
    result = model_config.default(values.model or "")
  if values.model:
    result.model.folder = values.model
  for name in model_config.SAMPLING:
    if name in values and values[name].value is not None:
      result.eval[name] = values[name].value
  return result

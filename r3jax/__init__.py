"""r3jax: Reason-Reflect-Refine reinforcement learning of BAGEL in JAX.

  import r3jax

  model = r3jax.load("shapes")
  (sample,) = model.generate("a photo of a red ring and a blue bow")
  config = r3jax.get_config("r3_geneval:shapes")
  r3jax.train(config, "runs/first")
  r3jax.evaluate(config, "evaluations/first", checkpoint="runs/first")

JAX is imported when the first of these names is used.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for editors and type checkers
  from r3jax.files.config_files import load as get_config
  from r3jax.inference import Model as Model
  from r3jax.inference import load as load
  from r3jax.run.evaluation_job import evaluate_model as evaluate
  from r3jax.run.loop import train as train

__version__ = "0.2.0"
__all__ = ["Model", "__version__", "evaluate", "get_config", "load", "train"]

# public name -> module and attribute
_PUBLIC = {
  "Model": ("r3jax.inference", "Model"),
  "evaluate": ("r3jax.run.evaluation_job", "evaluate_model"),
  "get_config": ("r3jax.files.config_files", "load"),
  "load": ("r3jax.inference", "load"),
  "train": ("r3jax.run.loop", "train"),
}


def __getattr__(name: str):
  """Imports a public name when it is first used."""
  if name not in _PUBLIC:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  module_name, attribute = _PUBLIC[name]
  return getattr(importlib.import_module(module_name), attribute)


def __dir__() -> list[str]:
  """Lists the public names."""
  return sorted(__all__)

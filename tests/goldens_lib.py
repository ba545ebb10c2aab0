"""The golden model, for tests beside those of its recorded numbers (tests/parity)."""

import functools
import pathlib

import jax
import numpy as np

from r3jax.model import architecture
from r3jax.model import image_encoders
from r3jax.model import network
from r3jax.parity import goldens
from r3jax.parity import model
from r3jax.parity import scenes
from r3jax.sequence import segments

FOLDER = pathlib.Path(__file__).parent / "goldens" / "tiny-a"
GOLDEN = goldens.Golden(FOLDER)
padded, rows_of = model.padded, model.unpacked


def config() -> architecture.BagelConfig:
  return GOLDEN.config


def weights() -> dict:
  # also when a traced function is the first to ask
  with jax.ensure_compile_time_eval():
    return GOLDEN.weights


def case(name: str) -> dict[str, np.ndarray]:
  return GOLDEN.arrays(name)


def bagel_model() -> network.Bagel:
  return GOLDEN.bagel


def towers(size: tuple[int, int] | None = None) -> image_encoders.Towers:
  return GOLDEN.towers(size)


def run(layout: segments.Layout, inputs, lengths, past=()) -> network.Output:
  """Runs segments through the golden policy, compiled."""
  return model.run(GOLDEN, layout, inputs, lengths, past)


read = functools.partial(model.read, GOLDEN)
look = functools.partial(model.look, GOLDEN)
texts = functools.partial(model.texts, GOLDEN)
images = functools.partial(model.images, GOLDEN)
scene = functools.partial(scenes.scene, GOLDEN)
edit_scene = functools.partial(scenes.edit, GOLDEN)


def repeated(ids: np.ndarray, rows: int):
  """Returns one text as ids and lengths of `rows` rows."""
  return padded([ids] * rows)

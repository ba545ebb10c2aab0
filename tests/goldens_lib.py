"""The golden model, for tests beside those of its recorded numbers (tests/parity)."""

import functools
import pathlib

import jax
import numpy as np

from r3jax.model import architecture
from r3jax.model import image_encoders
from r3jax.model import network
from r3jax.parity import case_arrays
from r3jax.parity import goldens
from r3jax.parity import passes
from r3jax.parity import scenes
from r3jax.sequence import segments

FOLDER = pathlib.Path(__file__).parent / "goldens" / "tiny-a"
GOLDEN = goldens.Golden(FOLDER)
padded = case_arrays.padded
rows_of = case_arrays.unpacked


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
  return passes.run(GOLDEN, layout, inputs, lengths, past)


read = functools.partial(passes.read, GOLDEN)
look = functools.partial(passes.look, GOLDEN)
texts = functools.partial(case_arrays.texts, GOLDEN)
images = functools.partial(case_arrays.images, GOLDEN)
scene = functools.partial(scenes.scene, GOLDEN)
edit_scene = functools.partial(scenes.edit, GOLDEN)


def repeated(ids: np.ndarray, rows: int):
  """Returns one text as ids and lengths of `rows` rows."""
  return padded([ids] * rows)

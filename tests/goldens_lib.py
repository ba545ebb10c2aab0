"""Reading the golden folder and driving the model on its cases.

Every size comes from the files; all products are in full float32 (tests/conftest.py).
"""

import dataclasses
import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

from r3jax.io import bagel_checkpoint
from r3jax.io import images as images_lib
from r3jax.models import bagel
from r3jax.models import config as config_lib
from r3jax.models import towers as towers_lib
from r3jax.sampling import guidance as guidance_lib
from r3jax.sequence import layout as layout_lib
from r3jax.sequence import stages

FOLDER = pathlib.Path(__file__).parent / "goldens" / "tiny-a"
UNUSED = 2  # capacity of a text segment that a case does not have


@functools.cache
def config() -> config_lib.BagelConfig:
  return config_lib.from_folder(FOLDER)


@functools.cache
def constants() -> dict:
  return json.loads((FOLDER / "constants.json").read_text())


@functools.cache
def weights() -> dict:
  with jax.ensure_compile_time_eval():  # also when a traced function is the first to ask
    return jax.tree.map(jnp.asarray, bagel_checkpoint.load(FOLDER, config()))


@functools.cache
def case(name: str) -> dict[str, np.ndarray]:
  with np.load(FOLDER / f"{name}.npz") as arrays:
    return dict(arrays)


@functools.cache
def manifest() -> dict:
  return json.loads((FOLDER / "manifest.json").read_text())


def bound(tolerance: float | str, expected: np.ndarray) -> np.ndarray | float:
  """Returns the largest allowed |seen - expected| under a tolerance of the manifest."""
  if tolerance == "exact":
    return 0.0
  if tolerance == "<=1 level":
    return 1.0
  if not isinstance(tolerance, str):
    return float(tolerance)
  relative = float(re.match(r"rtol ([^ ,]+)", tolerance)[1])
  absolute = re.search(r"atol ([^ ,]+)", tolerance)
  if tolerance.endswith("of max|grad|"):
    return relative * np.abs(expected).max()
  return relative * np.abs(expected) + (float(absolute[1]) if absolute else 1e-6)


def assert_close(name: str, array: str, seen) -> None:
  """Asserts that `seen` is the golden array within the manifest's tolerance."""
  tolerance = manifest()[name]["arrays"][array]["tol"]
  expected = case(name)[array]
  seen = np.asarray(seen)
  assert seen.shape == expected.shape, (seen.shape, expected.shape)
  error = np.abs(seen.astype(np.float64) - expected.astype(np.float64))
  allowed = bound(tolerance, expected.astype(np.float64))
  excess = np.max(error - allowed, initial=-1.0)
  assert excess <= 0, f"{name}/{array}: error {error.max()}, tolerance {tolerance!r}"


# The model.


def bagel_model() -> bagel.Bagel:
  return bagel.Bagel(config())


def towers(size: tuple[int, int] | None = None) -> towers_lib.Towers:
  return towers_lib.Towers(config(), tuple(size or constants()["image_hw"]))


def frozen() -> dict:
  return {name: weights()[name] for name in ("vision", "autoencoder")}


@functools.partial(jax.jit, static_argnames=("layout", "names"))
def _run(policy, layout, names, values, lengths, past):
  return bagel_model().apply({"params": policy}, layout, dict(zip(names, values)), lengths, past)


def run(layout: layout_lib.Layout, inputs, lengths, past=()) -> bagel.Output:
  """Runs segments through the golden policy, compiled."""
  values = tuple(inputs.values())
  return _run(weights()["policy"], layout, tuple(inputs), values, dict(lengths), tuple(past))


@functools.partial(jax.jit, static_argnames="method")
def read(hidden, method: str):
  """Reads logits or velocities."""
  return bagel_model().apply({"params": weights()["policy"]}, hidden, method=method)


@functools.partial(jax.jit, static_argnames=("layout", "names"))
def velocities(policy, layout, names, latent, t, lengths, past) -> tuple[jax.Array, ...]:
  """Returns the velocities of the named noise segments, each fed the same latent."""
  model, noised = bagel_model(), bagel.Noised(latent, t)
  output = model.apply({"params": policy}, layout, {name: noised for name in names}, lengths, past)
  read_one = lambda name: model.apply({"params": policy}, output.latent(name), method="velocity")
  return tuple(read_one(name) for name in names)


@functools.partial(jax.jit, static_argnames="size")
def _decode_images(params, latent: jax.Array, size: tuple[int, int]) -> jax.Array:
  return towers(size).decode(params, latent)


def decode_images(latent: jax.Array, size: tuple[int, int]) -> jax.Array:
  """Returns the 8-bit images of latent tokens."""
  return _decode_images(frozen(), latent, size)


@jax.jit
def _look(params, pictures: jax.Array):
  tower = towers(pictures.shape[1:3])
  return tower.features(params, pictures), tower.encode(params, pictures)


def look(pictures: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the ViT features and the clean latents of 8-bit images."""
  return _look(frozen(), pictures)


# Inputs of the cases.


def padded(rows: list[np.ndarray], capacity: int | None = None):
  """Returns ids [B, capacity] and lengths [B] of text segments."""
  capacity = capacity or max(len(row) for row in rows)
  ids = np.zeros((len(rows), capacity), np.int32)
  for row, target in zip(rows, ids):
    target[: len(row)] = row
  return jnp.asarray(ids), jnp.asarray([len(row) for row in rows], jnp.int32)


def texts(name: str, array: str, extra: int = 0):
  """Returns ids and lengths of the arrays `array`_0, `array`_1, ..., with `extra` empty slots."""
  arrays, rows = case(name), []
  while f"{array}_{len(rows)}" in arrays:
    rows.append(arrays[f"{array}_{len(rows)}"])
  return padded(rows, max(map(len, rows)) + extra)


def repeated(ids: np.ndarray, rows: int):
  """Returns one text as ids and lengths of `rows` rows."""
  return padded([ids] * rows)


def images(name: str) -> jax.Array:
  """Returns the case's uint8 images, [B, H, W, 3]."""
  arrays, found = case(name), []
  while f"image_{len(found)}" in arrays:
    found.append(arrays[f"image_{len(found)}"])
  return jnp.stack(found)


def pixels_nchw(images_uint8: jax.Array, transform: config_lib.ImageTransform) -> np.ndarray:
  size = images_lib.target_size(*images_uint8.shape[1:3], transform)
  pixels = images_lib.to_pixels(images_lib.resize(images_uint8, size))
  return np.asarray(pixels).transpose(0, 3, 1, 2)


def rows_of(tokens: np.ndarray, rows: int = 2) -> jax.Array:
  """Returns packed tokens [B * N, ...] as [B, N, ...]."""
  return jnp.asarray(tokens.reshape(rows, -1, *tokens.shape[1:]))


@dataclasses.dataclass(frozen=True)
class Scene:
  """A cached context and the noise segments that are sampled after it."""

  layout: layout_lib.Layout
  output: bagel.Output  # of the context
  lengths: dict[str, jax.Array]
  noise: tuple[str, ...]  # conditional, without text[, without image]
  guidance: guidance_lib.Guidance
  size: tuple[int, int]  # pixels

  @property
  def past(self) -> tuple[bagel.Cache]:
    return (self.output.cache,)

  def branches(self, latent, t) -> tuple[jax.Array, ...]:
    """Returns the velocities of all branches at the latent [B, N, C] and the scalar time."""
    t = jnp.full(latent.shape[0], t, latent.dtype)
    policy = weights()["policy"]
    return velocities(policy, self.layout, self.noise, latent, t, self.lengths, self.past)


def _scales(name: str) -> tuple[float, float]:
  return float(case(name)["scales"][0]), float(case(name)["scales"][1])


@functools.cache
def draft_scene(name: str) -> Scene:
  """Returns the context of a `*_gen` case: the reason stage without a thought."""
  prompt, prompt_lengths = texts(name, "prompt_ids")
  system, system_lengths = repeated(case(name)["system_ids"], len(prompt))
  size = tuple(constants()["image_hw"])
  capacities = stages.Capacities(
      system.shape[1],
      prompt.shape[1],
      UNUSED,
      UNUSED,
      UNUSED,
      UNUSED,
      towers(size).latent_grid,
      (1, 1),
  )
  layout = stages.reason(capacities)
  lengths = {"system": system_lengths, "prompt": prompt_lengths, "thought": 0 * prompt_lengths}
  output = run(layout, {"system": system, "prompt": prompt}, lengths)
  guidance = guidance_lib.Guidance(_scales(name)[0], 1.0, "global")
  return Scene(layout, output, lengths, stages.DRAFT, guidance, size)


@functools.cache
def edit_scene(name: str) -> Scene:
  """Returns the context of a `*_edit` case: the refine stage."""
  ids, id_lengths = texts(name, "edit_ids")
  pictures = images(name)
  size = tuple(pictures.shape[1:3])
  tower = towers(size)
  capacities = stages.Capacities(
      UNUSED, UNUSED, UNUSED, UNUSED, UNUSED, ids.shape[1], tower.latent_grid, tower.vit_grid
  )
  layout = stages.refine(capacities)
  features, latent = look(pictures)
  lengths = {"instruction": id_lengths, "instruction_alone": id_lengths}
  clean = bagel.Noised(latent, jnp.zeros(len(ids)))
  inputs = {"source": clean, "seen": features, "instruction": ids, "instruction_alone": ids}
  output = run(layout, inputs, lengths)
  guidance = guidance_lib.Guidance(*_scales(name), "text_channel")
  return Scene(layout, output, lengths, stages.EDIT, guidance, size)


def scene(name: str) -> Scene:
  """Returns the context of a flow case."""
  return draft_scene(name) if name.endswith("gen") else edit_scene(name)

"""Trains the two image encoders of the small BAGEL on random scenes: autoencoder and ViT."""

from collections.abc import Callable
import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from r3jax import types
from r3jax.model import architecture
from r3jax.model import autoencoder
from r3jax.model import layers
from r3jax.model import preprocess
from r3jax.model import siglip
from r3jax.sft import fitting
from r3jax.sft import stages
from r3jax.worlds.shapes import batches
from r3jax.worlds.shapes import scenes

# What a cell can hold, in the order of the ViT's reading head.
_EMPTY, _OBJECT, _SMUDGE = range(3)
_NUM_STATES = 3


# --- Autoencoder -------------------------------------------------------------------------------


def autoencoder_loss(
  model: autoencoder.Autoencoder,
  params: types.Params,
  images: types.Images,
  kl_weight: float,
  key: jax.Array,
) -> tuple[jax.Array, fitting.Metrics]:
  """Returns pixel MSE + kl_weight * KL(posterior | standard normal), and its parts.

  Args:
    model: the autoencoder.
    params: its parameters.
    images: [B, H, W, 3] uint8.
    kl_weight: weight of the mean KL per latent number.
    key: latents are drawn from the posterior.
  """
  pixels = preprocess.to_pixels(images)
  moments = model.apply({"params": params}, pixels, method="moments")
  mean, logvar = jnp.split(moments, 2, axis=-1)
  logvar = jnp.clip(logvar, -20.0, 10.0)
  latent = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
  restored = model.apply({"params": params}, latent, method=_decode)
  mse = jnp.mean((restored - pixels) ** 2)
  kl = 0.5 * jnp.mean(mean**2 + jnp.exp(logvar) - 1 - logvar)
  return mse + kl_weight * kl, {"mse": mse, "kl": kl}


def _decode(model: autoencoder.Autoencoder, latent: types.Latent) -> jax.Array:
  """Decodes latents that are neither scaled nor shifted."""
  return model.decoder(latent)


def train_autoencoder(
  sizes: architecture.BagelConfig,
  stage: stages.Stage,
  kl_weight: float,
  seed: int,
) -> tuple[types.Params, architecture.BagelConfig]:
  """Trains the autoencoder on dense scenes from nothing.

  Args:
    sizes: of the model.
    stage: trains.
    kl_weight: see `autoencoder_loss`.
    seed: seed of parameters, scenes and noise.

  Returns:
    Its parameters, and the sizes with the scale and shift that make its latents standard.
  """
  model = autoencoder.Autoencoder(sizes.autoencoder)
  blank = jnp.zeros((1, scenes.CANVAS, scenes.CANVAS, 3))
  variables = jax.jit(model.init)(jax.random.key(seed), blank)
  params = nn.unbox(variables)["params"]

  def loss(params, scene, key):
    images = scenes.render(scene)
    return autoencoder_loss(model, params, images, kl_weight, key)

  params = stage.fit(loss, params, _dense_scene(seed), seed)

  # Latents are measured on scenes that it was not trained on.
  (scene,) = batches.iterate(_dense_scene(seed + 1), 256, 1)
  pixels = preprocess.to_pixels(scenes.render(scene))
  moments = model.apply({"params": params}, pixels, method="moments")
  mean = np.asarray(jnp.split(moments, 2, axis=-1)[0], np.float64)
  measured = dataclasses.replace(
    sizes.autoencoder,
    scale=round(float(1 / mean.std()), 4),
    shift=round(float(mean.mean()), 4),
  )
  return params, dataclasses.replace(sizes, autoencoder=measured)


# --- ViT ---------------------------------------------------------------------------------------


def vision_loss(
  tower: siglip.VisionTransformer, params: types.Params, scene: scenes.Scene
) -> tuple[jax.Array, fitting.Metrics]:
  """Returns the cross-entropy of a linear reading of every cell's ViT feature, and its parts.

  Args:
    tower: a ViT whose patches are the cells.
    params: {"tower", "head"}; the head [hidden, 3 + shapes + colours + cells] reads what the cell
      holds (nothing, an object or a smudge), the object's shape, its colour, and which cell it is.
    scene: [B, 9].
  """
  pixels = preprocess.to_pixels(scenes.render(scene))
  patches = layers.patchify(pixels, scenes.CELL)
  positions = layers.grid_positions(scenes.GRID, scenes.GRID, scenes.GRID)
  features = tower.apply({"params": params["tower"]}, patches, positions)
  widths = (_NUM_STATES, len(scenes.SHAPES), len(scenes.COLORS))
  state, shape, color, cell = jnp.split(
    features @ params["head"], np.cumsum(widths), axis=-1
  )
  filled = scene.shape >= 0
  clear = filled & (scene.ghost_shape < 0)

  def mean_of_clear(values: jax.Array) -> jax.Array:
    count = jnp.maximum(jnp.sum(clear), 1)
    return jnp.sum(jnp.where(clear, values, 0.0)) / count

  cross_entropy = optax.softmax_cross_entropy_with_integer_labels
  filled_state = jnp.where(clear, _OBJECT, _SMUDGE)
  right_state = jnp.where(filled, filled_state, _EMPTY)
  state_loss = jnp.mean(cross_entropy(state, right_state))
  # An empty cell has shape -1, which is no index; it does not count.
  right_shape = jnp.maximum(scene.shape, 0)
  shape_loss = mean_of_clear(cross_entropy(shape, right_shape))
  color_loss = mean_of_clear(cross_entropy(color, scene.color))
  # Without this, features hardly say where they are, and a policy learns shapes and colours of an
  # image long before their cells.
  right_cell = jnp.broadcast_to(
    jnp.arange(len(scenes.CELLS)), scene.shape.shape
  )
  cell_loss = jnp.mean(cross_entropy(cell, right_cell))
  value = state_loss + shape_loss + color_loss + cell_loss
  shapes_right = mean_of_clear(jnp.argmax(shape, -1) == scene.shape)
  return value, {"vision": value, "shapes right": shapes_right}


def train_vision(
  sizes: architecture.BagelConfig, stage: stages.Stage, seed: int
) -> types.Params:
  """Trains the ViT from nothing to tell what every cell of a dense scene holds.

  BAGEL's ViT comes pretrained as SigLIP; this takes the place of that.

  Args:
    sizes: of the model.
    stage: trains.
    seed: seed of parameters and scenes.
  """
  tower = siglip.VisionTransformer(sizes.vision)
  patches = jnp.zeros((1, 1, 3 * sizes.vision.patch_size**2))
  positions = jnp.zeros(1, jnp.int32)
  variables = jax.jit(tower.init)(jax.random.key(seed), patches, positions)
  names = (*scenes.SHAPES, *scenes.COLORS, *scenes.CELLS)
  num_readings = _NUM_STATES + len(names)
  params = {
    "tower": nn.unbox(variables)["params"],
    "head": jnp.zeros((sizes.vision.hidden_size, num_readings)),
  }

  def loss(params, scene, key):
    del key  # nothing is drawn
    return vision_loss(tower, params, scene)

  # Other scenes than those of the autoencoder.
  return stage.fit(loss, params, _dense_scene(seed + 2), seed)["tower"]


def _dense_scene(seed: int) -> Callable[[int], scenes.Scene]:
  """Returns what draws random scenes by their numbers."""
  return functools.partial(batches.dense_scene, seed=seed)

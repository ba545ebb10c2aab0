"""Cases a, b and n: autoencoder, vision tower, resizing."""

from collections.abc import Iterator
import functools

import jax
import jax.numpy as jnp
import numpy as np

from r3jax.model import architecture
from r3jax.model import autoencoder
from r3jax.model import layers
from r3jax.model import network
from r3jax.model import preprocess
from r3jax.model import siglip
from r3jax.parity import goldens
from r3jax.parity import results

Golden = goldens.Golden
Result = results.Result


def autoencoding(golden: Golden, case: str) -> Iterator[Result]:
  """Yields case a: moments, latents and their tokens; decoding to pixels and bytes."""
  arrays = golden.arrays(case)
  patch = golden.config.latent_patch
  pixels = jnp.asarray(_channels_last(arrays["image"]))
  moments = _autoencoder(golden, "moments", pixels)
  yield Result("moments", _channels_first(moments))

  tokens = _autoencoder(golden, "encode", pixels)
  yield Result("latent_tokens", tokens)
  grid = _token_grid(arrays["latent"], patch)
  latent = layers.unpatchify(tokens, grid, patch)
  yield Result("latent", _channels_first(latent))

  latent = jnp.asarray(_channels_last(arrays["decode_latent"]))
  tokens = layers.patchify(latent, patch)
  yield Result("decode_latent_tokens", tokens)
  grid = _token_grid(arrays["decode_latent"], patch)
  decoded = _autoencoder(golden, "decode", tokens, grid)
  yield Result("decode_image", _channels_first(decoded))
  yield Result("decode_uint8", preprocess.to_uint8(decoded))


def _token_grid(latent: np.ndarray, patch: int) -> tuple[int, int]:
  """Returns the rows and columns of tokens of a latent [B, z, h, w]."""
  *_, height, width = latent.shape
  return height // patch, width // patch


def _autoencoder(
  golden: Golden, method: str, x: jax.Array, *static_arguments
) -> jax.Array:
  """Returns the output of a method of the autoencoder, compiled."""
  config = golden.config
  model = autoencoder.Autoencoder(
    config.autoencoder, golden.dtype, config.latent_patch
  )

  @jax.jit
  def apply(params, x):
    return model.apply({"params": params}, x, *static_arguments, method=method)

  return apply(golden.weights["autoencoder"], x)


def vision(golden: Golden, case: str) -> Iterator[Result]:
  """Yields case b: features and connector of one image, and of two of different sizes."""
  arrays = golden.arrays(case)
  config = golden.config.vision
  for prefix, names in (("one", ("image1",)), ("two", ("image1", "image2"))):
    position_ids = []
    num_patches = []
    patches = []
    outputs = []
    for name in names:
      pixels = jnp.asarray(_channels_last(arrays[name])[None])
      _, height, width, _ = pixels.shape
      grid = (height // config.patch_size, width // config.patch_size)
      ids = layers.grid_positions(*grid, config.positions_per_side)
      tokens = layers.patchify(pixels, config.patch_size)
      position_ids.append(ids)
      num_patches.append(grid[0] * grid[1])
      patches.append(tokens[0])
      outputs.append(_look(golden, golden.weights, tokens, grid))
    yield Result(f"{prefix}_position_ids", np.concatenate(position_ids))
    yield Result(f"{prefix}_seqlens", np.array(num_patches))
    if prefix == "two":
      yield Result("two_pixel_tokens", np.concatenate(patches))
    for i, name in enumerate(("vit_features", "connector", "final")):
      parts = [output[i] for output in outputs]
      yield Result(f"{prefix}_{name}", np.concatenate(parts))


@functools.partial(jax.jit, static_argnames=("golden", "grid"))
def _look(
  golden: Golden, weights, patches: jax.Array, grid: tuple[int, int]
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns ViT features, the connector's output for them, and that with positions, [N, D] each."""
  config = golden.config.vision
  ids = layers.grid_positions(*grid, config.positions_per_side)
  tower = siglip.VisionTransformer(config, golden.dtype)
  features = tower.apply({"params": weights["vision"]}, patches, ids)

  def connector(module: network.Bagel, x: jax.Array) -> jax.Array:
    return module.connector(x)

  variables = {"params": weights["policy"]}
  connected = golden.bagel.apply(variables, features, method=connector)
  final = golden.bagel.apply(variables, features, grid, method="embed_vision")
  return features[0], connected[0], final[0]


def sizes_after_resize(golden: Golden, case: str) -> Iterator[Result]:
  """Yields case n: target sizes under both transforms."""
  rules = golden.rules(case)
  for name, raw in rules["transforms"].items():
    transform = architecture.ImageTransform(
      raw["max_size"], raw["min_size"], raw["stride"]
    )
    sizes = []
    for width, height in rules["wh_in"]:
      target = preprocess.target_size(height, width, transform)
      sizes.append((target[1], target[0]))
    yield Result(name, np.array(sizes), np.array(raw["wh_out"]), "exact")


def resized_pixels(golden: Golden, case: str) -> Iterator[Result]:
  """Yields case n: pixels under both transforms."""
  config = golden.config
  images = jnp.asarray(golden.arrays(case)["image"])[None]
  for name, transform in (
    ("vae", config.autoencoder_transform),
    ("vit", config.vision_transform),
  ):
    yield Result(name, transformed(golden, images, transform)[0])


def transformed(
  golden: Golden, images: jax.Array, transform: architecture.ImageTransform
) -> np.ndarray:
  """Returns 8-bit images [B, h, w, 3] as pixels of a transform, [B, 3, h', w']."""
  _, height, width, _ = images.shape
  size = preprocess.target_size(height, width, transform)
  resized = preprocess.resize(images, size, golden.resize_order)
  return _channels_first(preprocess.to_pixels(resized))


def _channels_last(x: np.ndarray) -> np.ndarray:
  return np.moveaxis(x, -3, -1)


def _channels_first(x: jax.Array) -> np.ndarray:
  return np.moveaxis(np.asarray(x), -1, -3)

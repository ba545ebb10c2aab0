"""Cases a, b and n: autoencoder, vision tower, resizing."""

from collections.abc import Iterator
import functools

import jax
import jax.numpy as jnp
import numpy as np

from r3jax.model import architecture
from r3jax.model import autoencoder
from r3jax.model import layers
from r3jax.model import preprocess
from r3jax.model import siglip
from r3jax.parity import goldens
from r3jax.parity import seen

Golden, Seen = goldens.Golden, seen.Seen


def _channels_last(x: np.ndarray) -> np.ndarray:
  return np.moveaxis(x, -3, -1)


def _channels_first(x: jax.Array) -> np.ndarray:
  return np.moveaxis(np.asarray(x), -1, -3)


def _autoencoder(golden: Golden, method: str, *arguments) -> jax.Array:
  config = golden.config
  model = autoencoder.Autoencoder(
    config.autoencoder, golden.dtype, config.latent_patch
  )
  call = lambda params, x: model.apply(
    {"params": params}, x, *arguments[1:], method=method
  )
  return jax.jit(call)(golden.weights["autoencoder"], arguments[0])


def autoencoding(golden: Golden, case: str) -> Iterator[Seen]:
  """Case a: moments, latents and their tokens; decoding to pixels and bytes."""
  arrays, patch = golden.arrays(case), golden.config.latent_patch
  pixels = jnp.asarray(_channels_last(arrays["image"]))
  grid = lambda latent: tuple(side // patch for side in latent.shape[2:])
  yield Seen(
    "moments", _channels_first(_autoencoder(golden, "moments", pixels))
  )
  tokens = _autoencoder(golden, "encode", pixels)
  yield Seen("latent_tokens", tokens)
  yield Seen(
    "latent",
    _channels_first(layers.unpatchify(tokens, grid(arrays["latent"]), patch)),
  )
  tokens = layers.patchify(
    jnp.asarray(_channels_last(arrays["decode_latent"])), patch
  )
  yield Seen("decode_latent_tokens", tokens)
  decoded = _autoencoder(
    golden, "decode", tokens, grid(arrays["decode_latent"])
  )
  yield Seen("decode_image", _channels_first(decoded))
  yield Seen("decode_uint8", preprocess.to_uint8(decoded))


@functools.partial(jax.jit, static_argnames=("golden", "grid"))
def _look(golden: Golden, weights, patches, grid: tuple[int, int]):
  """Returns ViT features, and what the connector makes of them without and with positions."""
  vision, policy = golden.config.vision, weights["policy"]
  ids = layers.grid_positions(*grid, vision.positions_per_side)
  features = siglip.VisionTransformer(vision, golden.dtype).apply(
    {"params": weights["vision"]}, patches, ids
  )
  apply = functools.partial(golden.bagel.apply, {"params": policy})
  connected = apply(features, method=lambda module, x: module.connector(x))
  return (
    features[0],
    connected[0],
    apply(features, grid, method="embed_vision")[0],
  )


def vision(golden: Golden, case: str) -> Iterator[Seen]:
  """Case b: features and connector of one image, and of two of different sizes."""
  arrays, sizes = golden.arrays(case), golden.config.vision
  for prefix, names in (("one", ("image1",)), ("two", ("image1", "image2"))):
    pictures = [_channels_last(arrays[name])[None] for name in names]
    grids = [
      tuple(side // sizes.patch_size for side in x.shape[1:3]) for x in pictures
    ]
    patches = [
      layers.patchify(jnp.asarray(x), sizes.patch_size) for x in pictures
    ]
    ids = [
      layers.grid_positions(*grid, sizes.positions_per_side) for grid in grids
    ]
    found = zip(
      *(
        _look(golden, golden.weights, x, grid)
        for x, grid in zip(patches, grids)
      )
    )
    yield Seen(f"{prefix}_position_ids", np.concatenate(ids))
    yield Seen(
      f"{prefix}_seqlens", np.array([height * width for height, width in grids])
    )
    if prefix == "two":
      yield Seen("two_pixel_tokens", np.concatenate([x[0] for x in patches]))
    for name, parts in zip(("vit_features", "connector", "final"), found):
      yield Seen(f"{prefix}_{name}", np.concatenate(parts))


def sizes_after_resize(golden: Golden, case: str) -> Iterator[Seen]:
  """Case n: target sizes under both transforms."""
  rules = golden.rules(case)
  for name, raw in rules["transforms"].items():
    transform = architecture.ImageTransform(
      raw["max_size"], raw["min_size"], raw["stride"]
    )
    sizes = [
      preprocess.target_size(height, width, transform)[::-1]
      for width, height in rules["wh_in"]
    ]
    yield Seen(name, np.array(sizes), np.array(raw["wh_out"]), "exact")


def transformed(
  images: jax.Array, transform: architecture.ImageTransform
) -> np.ndarray:
  """Returns 8-bit images [B, H, W, 3] as pixels of a transform, [B, 3, h, w]."""
  size = preprocess.target_size(*images.shape[1:3], transform)
  return _channels_first(preprocess.to_pixels(preprocess.resize(images, size)))


def resized_pixels(golden: Golden, case: str) -> Iterator[Seen]:
  """Case n: pixels under both transforms."""
  image, config = jnp.asarray(golden.arrays(case)["image"])[None], golden.config
  for name, transform in (
    ("vae", config.autoencoder_transform),
    ("vit", config.vision_transform),
  ):
    yield Seen(name, transformed(image, transform)[0])

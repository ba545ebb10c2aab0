"""What the embedded world's verifier sees in images, for readers on the host."""

import functools

import jax
import numpy as np

from r3jax.worlds.shapes import edits
from r3jax.worlds.shapes import scenes
from r3jax.worlds.shapes import verifier

_detect = functools.cache(lambda: jax.jit(verifier.detect))


def objects(images: np.ndarray) -> list[list[edits.Object]]:
  """Returns (shape, color, cell) of the objects of every image, uint8 [B, 48, 48, 3], in cell order."""
  found = jax.device_get(_detect()(images))
  return [
    [
      (int(shape), int(color), cell)
      for cell, (shape, color) in enumerate(zip(*row))
      if shape >= 0
    ]
    for row in zip(found.shape, found.color)
  ]


def boxes(images: np.ndarray) -> list[list[dict]]:
  """Returns {"label", "box": [y0, x0, y1, x1] in shares of the image} of the objects of every image."""
  found = jax.device_get(_detect()(images))
  named = lambda shape, color: f"{scenes.COLORS[color]} {scenes.SHAPES[shape]}"
  return [
    [
      {
        "label": named(shape, color),
        "box": [round(float(x) / scenes.CANVAS, 4) for x in box],
      }
      for shape, color, box in zip(*row)
      if shape >= 0
    ]
    for row in zip(found.shape, found.color, found.box)
  ]

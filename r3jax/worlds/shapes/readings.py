"""What the verifier of the embedded world sees in images, for readers on the host."""

import functools

import jax
import numpy as np

from r3jax.worlds.shapes import edits
from r3jax.worlds.shapes import scenes
from r3jax.worlds.shapes import verifier


@functools.cache
def _compiled_detect():
  return jax.jit(verifier.detect)


def objects(images: np.ndarray) -> list[list[edits.Object]]:
  """Returns the objects of every image of uint8 [B, 48, 48, 3], in cell order."""
  detected = jax.device_get(_compiled_detect()(images))
  return [
    _objects_of_image(shapes, colors)
    for shapes, colors in zip(detected.shape, detected.color, strict=True)
  ]


def _objects_of_image(
  shapes: np.ndarray, colors: np.ndarray
) -> list[edits.Object]:
  return [
    edits.Object(int(shapes[cell]), int(colors[cell]), int(cell))
    for cell in np.flatnonzero(shapes >= 0)
  ]


def boxes(images: np.ndarray) -> list[list[dict]]:
  """Returns the labelled boxes of the objects of every image of uint8 [B, 48, 48, 3].

  Returns:
    Per image {"label", "box": [y0, x0, y1, x1] in shares of the image} of every object.
  """
  detected = jax.device_get(_compiled_detect()(images))
  return [
    _boxes_of_image(shapes, colors, boxes)
    for shapes, colors, boxes in zip(
      detected.shape, detected.color, detected.box, strict=True
    )
  ]


def _boxes_of_image(
  shapes: np.ndarray, colors: np.ndarray, boxes: np.ndarray
) -> list[dict]:
  labelled = []
  for cell in np.flatnonzero(shapes >= 0):
    label = f"{scenes.COLORS[colors[cell]]} {scenes.SHAPES[shapes[cell]]}"
    box = [round(float(x) / scenes.CANVAS, 4) for x in boxes[cell]]
    labelled.append({"label": label, "box": box})
  return labelled

"""Verifies the embedded world a second time, in plain numpy and by another method.

The dominant colour of a cell comes from a vote of its pixels and the place of the object from where
that colour begins and ends; then every shape, drawn here as polygons and discs, is tried at and
around that place. GenEval's rules are loops over Python objects. It shares with r3jax the words,
the palette and what counts as an object (`_MOST_DIFFERENT`), nothing else.
"""

import functools
import itertools
import math

import numpy as np
from PIL import Image
from PIL import ImageDraw

from r3jax.worlds.shapes import scenes

_SCALE = 24
# Mean squared difference to the nearest drawing, of numbers in [0, 1], up to which it is an object.
_MOST_DIFFERENT = {
  "red": 0.01328,
  "green": 0.01255,
  "blue": 0.0112,
  "yellow": 0.00797,
  "purple": 0.00825,
  "black": 0.01375,
}
# Mean squared difference to the background, of numbers in [0, 1], up to which a cell is blank.
_BLANK = 0.008


@functools.cache
def _drawing(name, side):
  """Draws a shape in a square of `side` fine pixels; returns its coverage, 0 or 1."""

  def point(x, y):
    return (x * side, y * side)

  def disc(x, y, r):
    return [*point(x - r, y - r), *point(x + r, y + r)]

  image = Image.new("L", (side, side), 0)
  draw = ImageDraw.Draw(image)
  if name == "square":
    draw.rectangle([0, 0, side, side], fill=1)
  elif name == "ring":
    draw.ellipse(disc(0.5, 0.5, 0.5), fill=1)
    draw.ellipse(disc(0.5, 0.5, 0.27), fill=0)
  elif name == "cross":
    for a, b in (((0.0, 0.0), (1.0, 1.0)), ((1.0, 0.0), (0.0, 1.0))):
      dx = 0.2 if a[0] < b[0] else -0.2
      draw.polygon(
        [
          point(a[0] - dx, a[1]),
          point(a[0] + dx, a[1]),
          point(b[0] + dx, b[1]),
          point(b[0] - dx, b[1]),
        ],
        fill=1,
      )
  elif name == "spool":
    draw.polygon([point(0, 0), point(1, 0), point(0, 1), point(1, 1)], fill=1)
  elif name == "bow":
    draw.polygon([point(0, 0), point(0, 1), point(1, 0), point(1, 1)], fill=1)
  elif name == "heart":
    draw.ellipse(disc(0.25, 0.25, 0.26), fill=1)
    draw.ellipse(disc(0.75, 0.25, 0.26), fill=1)
    flank = [
      (0.5 - 0.5 * (1 - (d / 0.72) ** 1.3), 0.3 + d)
      for d in np.linspace(0, 0.7, 30)
    ]
    draw.polygon(
      [point(x, y) for x, y in flank + [(1 - x, y) for x, y in flank[::-1]]],
      fill=1,
    )
  return np.asarray(image, float)


@functools.cache
def _coverage(name, size, top, left):
  """Returns how much a shape covers of each pixel of a cell [16, 16]; all in pixels."""
  fine = np.zeros((16 * _SCALE, 16 * _SCALE))
  side, row, column = (round(_SCALE * x) for x in (size, top, left))
  fine[row : row + side, column : column + side] = _drawing(name, side)
  return fine.reshape(16, _SCALE, 16, _SCALE).mean((1, 3))


def _edges(profile):
  """Returns where a shape begins and ends in a profile of largest coverages [16], in pixels."""
  inside = np.flatnonzero(profile > 0.5)
  padded = np.pad(np.clip(profile, 0, 1), 1)  # pixel i is padded[i + 1]
  begin = inside[0] + 1 - padded[inside[0] : inside[0] + 2].sum()
  return begin, inside[-1] + padded[inside[-1] + 1 : inside[-1] + 3].sum()


def _boxes(alpha):
  """Yields (size, top, left) at half pixels, around the place of what is seen in `alpha`."""
  (top, bottom), (left, right) = (_edges(alpha.max(axis)) for axis in (1, 0))

  def half(x):
    return sorted({round(2 * (x + d)) / 2 for d in (-1, -0.5, 0, 0.5, 1)})

  size = max(bottom - top, right - left)
  for box in itertools.product(half(size), half(top), half(left)):
    inside = min(box[1:]) >= 0 and max(box[1:]) + box[0] <= 16
    if scenes.SIZES[0] <= box[0] <= scenes.SIZES[-1] and inside:
      yield box


def _read_cell(cell):
  """Returns (class, colour, top, left, size) of a cell [16, 16, 3], or None."""
  x = cell.astype(float)
  points = np.array((*scenes.PALETTE, scenes.BACKGROUND), float)
  nearest = np.argmin(((x[:, :, None] - points) ** 2).sum(-1), -1)
  ink = nearest[nearest < len(scenes.PALETTE)]
  if ink.size < 20:
    return None
  color = np.bincount(ink).argmax()
  tint = points[color] - points[-1]
  alpha = ((x - points[-1]) @ tint) / (tint @ tint)
  if not (alpha > 0.5).any():
    return None
  best = None, math.inf
  for size, top, left in _boxes(alpha):
    for name in scenes.SHAPES:
      drawn = points[-1] + _coverage(name, size, top, left)[..., None] * tint
      difference = (((x - drawn) / 255) ** 2).mean()
      if difference < best[1]:
        best = (name, scenes.COLORS[color], top, left, size), difference
  return best[0] if best[1] < _MOST_DIFFERENT[scenes.COLORS[color]] else None


def read(image):
  """Returns the objects of an image [48, 48, 3]: dicts of class, color, cell, box."""
  objects = []
  for cell in range(9):
    y, x = 16 * (cell // 3), 16 * (cell % 3)
    seen = _read_cell(image[y : y + 16, x : x + 16])
    if seen:
      name, color, top, left, size = seen
      box = (y + top, x + left, y + top + size, x + left + size)
      objects.append({"class": name, "color": color, "cell": cell, "box": box})
  return objects


def clutter(image, objects):
  """Returns the share of cells that are not blank and of which `objects` has none."""
  unread = 0
  for cell in {*range(9)} - {o["cell"] for o in objects}:
    y, x = 16 * (cell // 3), 16 * (cell % 3)
    pixels = image[y : y + 16, x : x + 16].astype(float)
    difference = (pixels - np.array(scenes.BACKGROUND)) / 255
    unread += (difference**2).mean() > _BLANK
  return unread / 9


def relation_holds(relation, a, b):
  """Tells if box a is in `relation` to box b."""
  offset = []
  for axis in (1, 0):
    d = (a[axis] + a[axis + 2] - b[axis] - b[axis + 2]) / 2
    reach = 0.1 * (a[axis + 2] - a[axis] + b[axis + 2] - b[axis])
    offset.append((d, math.copysign(max(abs(d) - reach, 0), d)))
  norm = math.hypot(offset[0][0], offset[1][0])
  if all(abs(shrunk) < 1e-3 for _, shrunk in offset):
    return False
  x, y = (shrunk / norm for _, shrunk in offset)
  return {
    "left of": x < -0.5,
    "right of": x > 0.5,
    "above": y < -0.5,
    "below": y > 0.5,
  }[relation]


def judge(objects, record):
  """Returns (value, strict, correct) of objects by a record whose items name different classes.

  They are those of an image without clutter.
  """
  record = record.to_json()
  include = record["include"]
  groups, clauses, correct = [], [], True
  for item in include:
    of_class = [o for o in objects if o["class"] == item["class"]]
    fits = [o for o in of_class if item.get("color", o["color"]) == o["color"]]
    groups.append(fits)
    asked = [of_class] + ([fits] if "color" in item else [])
    for found in asked:
      clauses.append(
        max(0, 1 - abs(item["count"] - len(found)) / item["count"])
      )
      correct &= len(found) >= item["count"]
  for item, fits in zip(include, groups):
    if "position" in item:
      relation, other = item["position"]
      holds = any(
        relation_holds(relation, a["box"], b["box"])
        for a in fits
        for b in groups[other]
      )
      clauses.append(float(holds))
      correct &= holds
  for item in record.get("exclude", []):
    correct &= sum(o["class"] == item["class"] for o in objects) < item["count"]
  extra = sum(
    o["class"] not in [item["class"] for item in include] for o in objects
  )
  strict = extra == 0 and all(clause == 1 for clause in clauses)
  return sum(clauses) / len(clauses) / (1 + extra), strict, correct

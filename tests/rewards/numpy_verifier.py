"""Verifies the embedded world a second time, in plain numpy and by another method.

Pixels are classed by colour, the dominant colour's coverage is compared with shapes drawn here as
polygons and discs, and GenEval's rules are loops over Python objects. It shares with r3jax the
words and the palette, nothing else.
"""

import functools
import math

import numpy as np
from PIL import Image
from PIL import ImageDraw

from r3jax.worlds import shapes

_SCALE = 24
_LEAST_OVERLAP = .85


@functools.cache
def _drawings(size):
  """Draws every shape in a square of `size` pixels; returns coverages by name."""
  s = size * _SCALE
  point = lambda x, y: (x * s, y * s)
  disc = lambda x, y, r: [*point(x - r, y - r), *point(x + r, y + r)]
  result = {}
  for name in shapes.SHAPES:
    image = Image.new("L", (s, s), 0)
    draw = ImageDraw.Draw(image)
    if name == "square":
      draw.rectangle([0, 0, s, s], fill=255)
    elif name == "ring":
      draw.ellipse(disc(.5, .5, .5), fill=255)
      draw.ellipse(disc(.5, .5, .27), fill=0)
    elif name == "cross":
      for a, b in (((.0, .0), (1., 1.)), ((1., .0), (.0, 1.))):
        dx = .2 if a[0] < b[0] else -.2
        draw.polygon([point(a[0] - dx, a[1]), point(a[0] + dx, a[1]), point(b[0] + dx, b[1]),
                      point(b[0] - dx, b[1])], fill=255)
    elif name == "spool":
      draw.polygon([point(0, 0), point(1, 0), point(0, 1), point(1, 1)], fill=255)
    elif name == "bow":
      draw.polygon([point(0, 0), point(0, 1), point(1, 0), point(1, 1)], fill=255)
    elif name == "heart":
      draw.ellipse(disc(.25, .25, .26), fill=255)
      draw.ellipse(disc(.75, .25, .26), fill=255)
      flank = [(.5 - .5 * (1 - (d / .72)**1.3), .3 + d) for d in np.linspace(0, .7, 30)]
      draw.polygon([point(x, y) for x, y in flank + [(1 - x, y) for x, y in flank[::-1]]], fill=255)
    result[name] = np.asarray(image, float).reshape(size, _SCALE, size, _SCALE).mean((1, 3)) / 255
  return result


def _read_cell(cell):
  """Returns (class, colour, y0, x0, size) of a cell [16, 16, 3], or None."""
  x = cell.astype(float)
  points = np.array((*shapes.PALETTE, shapes.BACKGROUND), float)
  nearest = np.argmin(((x[:, :, None] - points)**2).sum(-1), -1)
  ink = nearest[nearest < len(shapes.PALETTE)]
  if ink.size < 20:
    return None
  color = np.bincount(ink).argmax()
  tint = points[color] - points[-1]
  alpha = ((x - points[-1]) @ tint) / (tint @ tint)
  if np.sqrt(((x - points[-1] - alpha[..., None] * tint)**2).mean()) > 20:
    return None
  rows, columns = (np.flatnonzero((alpha > .3).any(axis)) for axis in (1, 0))
  if not rows.size:
    return None
  top, left, size = rows[0], columns[0], columns[-1] - columns[0] + 1
  if size not in shapes.SIZES or top + size > 16:
    return None
  alpha = np.where(alpha < .15, 0, np.minimum(alpha, 1))
  overlaps = {}
  for name, drawing in _drawings(int(size)).items():
    full = np.zeros((16, 16))
    full[top:top + size, left:left + size] = drawing
    overlaps[name] = np.minimum(full, alpha).sum() / np.maximum(full, alpha).sum()
  name = max(overlaps, key=overlaps.get)
  if overlaps[name] < _LEAST_OVERLAP:
    return None
  return name, shapes.COLORS[color], int(top), int(left), int(size)


def read(image):
  """Returns the objects of an image [48, 48, 3]: dicts of class, color, cell, box."""
  objects = []
  for cell in range(9):
    y, x = 16 * (cell // 3), 16 * (cell % 3)
    seen = _read_cell(image[y:y + 16, x:x + 16])
    if seen:
      name, color, top, left, size = seen
      box = (y + top, x + left, y + top + size, x + left + size)
      objects.append({"class": name, "color": color, "cell": cell, "box": box})
  return objects


def relation_holds(relation, a, b):
  """Tells if box a is in `relation` to box b."""
  offset = []
  for axis in (1, 0):
    d = (a[axis] + a[axis + 2] - b[axis] - b[axis + 2]) / 2
    reach = .1 * (a[axis + 2] - a[axis] + b[axis + 2] - b[axis])
    offset.append((d, math.copysign(max(abs(d) - reach, 0), d)))
  norm = math.hypot(offset[0][0], offset[1][0])
  if all(abs(shrunk) < 1e-3 for _, shrunk in offset):
    return False
  x, y = (shrunk / norm for _, shrunk in offset)
  return {"left of": x < -.5, "right of": x > .5, "above": y < -.5, "below": y > .5}[relation]


def judge(objects, record):
  """Returns (value, strict, correct) of objects by a record whose items name different classes."""
  include = record["include"]
  groups, clauses, correct = [], [], True
  for item in include:
    of_class = [o for o in objects if o["class"] == item["class"]]
    fits = [o for o in of_class if item.get("color", o["color"]) == o["color"]]
    groups.append(fits)
    asked = [of_class] + ([fits] if "color" in item else [])
    for found in asked:
      clauses.append(max(0, 1 - abs(item["count"] - len(found)) / item["count"]))
      correct &= len(found) >= item["count"]
  for item, fits in zip(include, groups):
    if "position" in item:
      relation, other = item["position"]
      holds = any(relation_holds(relation, a["box"], b["box"]) for a in fits for b in groups[other])
      clauses.append(float(holds))
      correct &= holds
  for item in record.get("exclude", []):
    correct &= sum(o["class"] == item["class"] for o in objects) < item["count"]
  extra = sum(o["class"] not in [item["class"] for item in include] for o in objects)
  strict = extra == 0 and all(clause == 1 for clause in clauses)
  return sum(clauses) / len(clauses) / (1 + extra), strict, correct

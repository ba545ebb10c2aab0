"""Tolerances as the goldens' manifests write them."""

import re

import numpy as np

_SMALL = 1e-6  # a relative tolerance does not hold below this magnitude


def allowed(tolerance: float | str, expected: np.ndarray) -> np.ndarray | float:
  """Returns the largest allowed |seen - expected|.

  Args:
    tolerance: a number (absolute), "exact", "<=1 level", "rtol R", "rtol R, atol A" or
      "rtol R of max|grad|".
    expected: what the tolerance is about.

  Raises:
    ValueError: the tolerance is written in another way.
  """
  if not isinstance(tolerance, str):
    return float(tolerance)
  if tolerance == "exact":
    return 0.0
  if tolerance == "<=1 level":
    return 1.0
  parts = re.fullmatch(
    r"rtol ([\d.e+-]+)(?:, atol ([\d.e+-]+)|( of max\|grad\|))?", tolerance
  )
  if not parts:
    raise ValueError(
      f"a tolerance must be a number, 'exact', '<=1 level' or 'rtol ...'; got {tolerance!r}"
    )
  relative, magnitude = float(parts[1]), np.abs(expected)
  if parts[3]:
    return relative * magnitude.max(initial=0.0)
  return relative * magnitude + float(parts[2] or relative * _SMALL)

"""Tolerances as the goldens' manifests write them."""

import re

import numpy as np

_SMALL = 1e-6  # a relative tolerance does not shrink below this magnitude
_RELATIVE = r"rtol ([\d.e+-]+)(?:, atol ([\d.e+-]+)|( of max\|grad\|))?"


def allowed(tolerance: float | str, expected: np.ndarray) -> np.ndarray | float:
  """Returns the largest allowed |computed - expected|.

  Args:
    tolerance: a number (absolute), "exact", "<=1 level", "rtol R", "rtol R, atol A" or
      "rtol R of max|grad|".
    expected: the recorded array.

  Raises:
    ValueError: the tolerance is written in another way.
  """
  if not isinstance(tolerance, str):
    return float(tolerance)
  if tolerance == "exact":
    return 0.0
  if tolerance == "<=1 level":
    return 1.0
  match = re.fullmatch(_RELATIVE, tolerance)
  if not match:
    raise ValueError(
      f"a tolerance must be a number, 'exact', '<=1 level' or 'rtol ...'; got {tolerance!r}"
    )
  relative, absolute, of_largest = match.groups()
  relative = float(relative)
  magnitude = np.abs(expected)
  if of_largest:
    return relative * magnitude.max(initial=0.0)
  return relative * magnitude + float(absolute or relative * _SMALL)

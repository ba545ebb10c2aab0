"""Bootstrap intervals of means over prompts."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95


class Interval(NamedTuple):
  """A mean with the bounds of its 95 % interval."""
  mean: float
  low: float
  high: float


def bootstrap_mean(values: Sequence[float], seed: int) -> Interval:
  """Estimates a mean by the percentile bootstrap.

  Draws len(values) of the values with replacement, 2,000 times; the bounds are the 2.5 % and 97.5 %
  quantiles of the means of the draws (Efron 1979).

  Args:
    values: independent measurements, one a prompt. Missing ones are for the caller to leave out.
    seed: of the draws.

  Raises:
    ValueError: if there are no values or one is not finite.
  """
  values = np.asarray(values, np.float64)
  if values.ndim != 1 or not values.size or not np.isfinite(values).all():
    raise ValueError(f"values must be a non-empty list of finite numbers, got {values}")
  rng = np.random.default_rng(seed)
  means = [rng.choice(values, values.size).mean() for _ in range(RESAMPLES)]
  low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
  return Interval(float(values.mean()), float(low), float(high))


def bootstrap_difference(before: Sequence[float], after: Sequence[float], seed: int) -> Interval:
  """Estimates the mean of after - before, paired: both measured on the same prompts, in order.

  Raises:
    ValueError: if the lengths differ, there are no values or one is not finite.
  """
  if len(before) != len(after):
    raise ValueError("before and after must be of the same prompts, got "
                     f"{len(before)} and {len(after)} values")
  return bootstrap_mean(np.subtract(after, before), seed)

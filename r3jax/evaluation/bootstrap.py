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


class Design(NamedTuple):
  """How measurements were drawn; one label a measurement.

  Images of one prompt are no independent witnesses of how other prompts would fare, and a set that
  holds as many of every tag does so in every draw.
  """

  clusters: Sequence[str]  # what was drawn at random: the prompt
  strata: Sequence[str]  # within what it was drawn: the prompt's tag


def _draws(
  values: np.ndarray, design: Design, rng: np.random.Generator
) -> np.ndarray:
  """Returns the means of RESAMPLES draws of whole clusters, as many of every stratum as there are."""
  means = []
  clusters, strata = np.asarray(design.clusters), np.asarray(design.strata)
  for stratum in dict.fromkeys(design.strata):
    inside = strata == stratum
    names, number = np.unique(clusters[inside], return_inverse=True)
    sums, sizes = np.bincount(number, values[inside]), np.bincount(number)
    drawn = rng.integers(len(names), size=(RESAMPLES, len(names)))
    means.append(sums[drawn].sum(1) / sizes[drawn].sum(1))
  return np.mean(means, axis=0)


def mean(values: np.ndarray, design: Design) -> float:
  """Returns the mean of the strata's means."""
  strata = np.asarray(design.strata)
  return float(
    np.mean(
      [
        values[strata == stratum].mean()
        for stratum in dict.fromkeys(design.strata)
      ]
    )
  )


def bootstrap_mean(
  values: Sequence[float], seed: int, design: Design | None = None
) -> Interval:
  """Estimates the mean of the strata's means by the percentile bootstrap (Efron 1979), 2,000 draws with replacement.

  The bounds are the 2.5 % and 97.5 % quantiles of the means of the draws.

  Args:
    values: measurements. Missing ones are for the caller to leave out.
    seed: of the draws.
    design: whole clusters are drawn, stratum by stratum; without it every value by itself.

  Raises:
    ValueError: there are no values, one is not finite, or the design has another number of labels.
  """
  values = np.asarray(values, np.float64)
  if values.ndim != 1 or not values.size or not np.isfinite(values).all():
    raise ValueError(
      f"values must be a non-empty list of finite numbers, got {values}"
    )
  if design is None:
    design = Design(range(values.size), [0] * values.size)
  if not len(design.clusters) == len(design.strata) == values.size:
    raise ValueError(
      f"a design must label each of {values.size} values, got {len(design.clusters)} and {len(design.strata)} labels"
    )
  means = _draws(values, design, np.random.default_rng(seed))
  low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
  return Interval(mean(values, design), float(low), float(high))


def bootstrap_difference(
  before: Sequence[float],
  after: Sequence[float],
  seed: int,
  design: Design | None = None,
) -> Interval:
  """Estimates the mean of after - before, paired: both measured on the same prompts, in order.

  Raises:
    ValueError: the lengths differ, or as in `bootstrap_mean`.
  """
  if len(before) != len(after):
    raise ValueError(
      "before and after must be of the same prompts, got "
      f"{len(before)} and {len(after)} values"
    )
  return bootstrap_mean(np.subtract(after, before), seed, design)

"""Estimates means over prompts with bootstrap intervals."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95


class Estimate(NamedTuple):
  """A mean with the bounds of its 95 % interval; a list of three numbers in JSON."""

  mean: float
  low: float
  high: float


class Design(NamedTuple):
  """How measurements were drawn.

  Images of one prompt are not independent evidence of how other prompts would score, and a set with
  a fixed number of prompts per tag has that number in every draw.

  Attributes:
    clusters: What was drawn at random, one label per measurement: the prompt.
    strata: What it was drawn within, one label per measurement: the prompt's tag.
  """

  clusters: Sequence[str]
  strata: Sequence[str]


def _resampled_means(
  values: np.ndarray, design: Design, rng: np.random.Generator
) -> np.ndarray:
  """Returns the means of RESAMPLES draws of whole clusters, stratum by stratum."""
  clusters = np.asarray(design.clusters)
  strata = np.asarray(design.strata)
  means = []
  for stratum in dict.fromkeys(design.strata):
    inside = strata == stratum
    # A draw only needs the sum and the size of every cluster.
    names, index = np.unique(clusters[inside], return_inverse=True)
    sums = np.bincount(index, values[inside])
    sizes = np.bincount(index)
    draws = rng.integers(len(names), size=(RESAMPLES, len(names)))
    means.append(sums[draws].sum(1) / sizes[draws].sum(1))
  return np.mean(means, axis=0)


def mean(values: np.ndarray, design: Design) -> float:
  """Returns the mean of the strata's means."""
  strata = np.asarray(design.strata)
  means = [
    values[strata == stratum].mean() for stratum in dict.fromkeys(design.strata)
  ]
  return float(np.mean(means))


def bootstrap_mean(
  values: Sequence[float], seed: int, design: Design | None = None
) -> Estimate:
  """Estimates the mean of the strata's means by the percentile bootstrap (Efron 1979).

  The bounds are the 2.5 % and 97.5 % quantiles of the means of 2,000 draws with replacement.

  Args:
    values: Measurements, without missing ones.
    seed: Seed of the draws.
    design: Whole clusters are drawn, stratum by stratum; by default every value by itself.

  Raises:
    ValueError: There are no values, one is not finite, or the design has another number of labels.
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
      f"a design must label each of {values.size} values, got {len(design.clusters)} and "
      f"{len(design.strata)} labels"
    )
  means = _resampled_means(values, design, np.random.default_rng(seed))
  low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
  return Estimate(mean(values, design), float(low), float(high))


def bootstrap_difference(
  before: Sequence[float],
  after: Sequence[float],
  seed: int,
  design: Design | None = None,
) -> Estimate:
  """Estimates the mean of after - before, paired: both measured on the same prompts, in order.

  Raises:
    ValueError: The lengths differ, or as in `bootstrap_mean`.
  """
  if len(before) != len(after):
    raise ValueError(
      "before and after must be of the same prompts, got "
      f"{len(before)} and {len(after)} values"
    )
  return bootstrap_mean(np.subtract(after, before), seed, design)

"""Estimates means over prompts with bootstrap intervals."""

from collections.abc import Callable, Sequence
import dataclasses
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
# Draws of fewer clusters say nothing about other clusters.
MIN_CLUSTERS = 5


class Estimate(NamedTuple):
  """A mean with its 95 % interval; a list of three values in JSON.

  The bounds are both None where the measurements give no interval, see `bootstrap_mean`.
  """

  mean: float
  low: float | None = None
  high: float | None = None

  @property
  def interval(self) -> tuple[float, float] | None:
    """The bounds; None where there is no interval."""
    if self.low is None or self.high is None:
      return None
    return self.low, self.high


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


@dataclasses.dataclass(frozen=True)
class _Stratum:
  """What a draw of whole clusters needs to know of a stratum.

  Attributes:
    sums: Sum of the values of every cluster, [k].
    sizes: Number of values of every cluster, [k].
    num_drawn: Number of clusters in a draw.
    weight: Number of strata that it stands for.
  """

  sums: np.ndarray
  sizes: np.ndarray
  num_drawn: int
  weight: int = 1


def _num_clusters(design: Design) -> int:
  """Returns the number of clusters of all strata."""
  return len(set(zip(design.strata, design.clusters, strict=True)))


def _strata(values: np.ndarray, design: Design) -> list[_Stratum]:
  """Returns the strata; one of a single cluster, whose draws are all equal, varies as others do.

  Several are pooled into one. Together they vary as the strata's means do, which is more than a
  cluster varies in its stratum: the interval is too wide, not too narrow. A single one is taken to
  vary as the clusters of all other strata do around the means of theirs.
  """
  clusters = np.asarray(design.clusters)
  labels = np.asarray(design.strata)
  strata = []
  single_means = []
  deviations = []
  for label in dict.fromkeys(design.strata):
    inside = labels == label
    names, index = np.unique(clusters[inside], return_inverse=True)
    if len(names) == 1:
      single_means.append(values[inside].mean())
      continue
    sums = np.bincount(index, values[inside])
    sizes = np.bincount(index)
    deviations.append(sums / sizes - values[inside].mean())
    strata.append(_Stratum(sums, sizes, num_drawn=len(names)))
  num_single = len(single_means)
  if num_single > 1:
    sizes = np.ones(num_single, int)
    strata.append(
      _Stratum(
        np.array(single_means), sizes, num_drawn=num_single, weight=num_single
      )
    )
  elif num_single == 1 and deviations:
    sums = single_means[0] + np.concatenate(deviations)
    strata.append(_Stratum(sums, np.ones(len(sums), int), num_drawn=1))
  return strata


def _resampled_means(
  strata: Sequence[_Stratum], rng: np.random.Generator
) -> np.ndarray:
  """Returns the means of RESAMPLES draws of whole clusters, stratum by stratum."""
  means = []
  for stratum in strata:
    draws = rng.integers(len(stratum.sums), size=(RESAMPLES, stratum.num_drawn))
    sums = stratum.sums[draws].sum(1)
    means.append(sums / stratum.sizes[draws].sum(1))
  weights = [stratum.weight for stratum in strata]
  return np.average(means, axis=0, weights=weights)


def resampled_means(
  values: np.ndarray, seed: int, design: Design
) -> np.ndarray:
  """Returns what `mean` is in RESAMPLES draws of whole clusters, [RESAMPLES].

  Equal designs and seeds have equal draws. Where fewer than MIN_CLUSTERS clusters give no interval
  of `bootstrap_mean`, all draws are the mean.
  """
  if _num_clusters(design) < MIN_CLUSTERS:
    return np.full(RESAMPLES, mean(values, design))
  strata = _strata(values, design)
  return _resampled_means(strata, np.random.default_rng(seed))


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

  The bounds are the 2.5 % and 97.5 % quantiles of the means of 2,000 draws with replacement. There
  is no interval where there are fewer than MIN_CLUSTERS clusters.

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
  average = mean(values, design)
  if _num_clusters(design) < MIN_CLUSTERS:
    return Estimate(average)
  strata = _strata(values, design)
  means = _resampled_means(strata, np.random.default_rng(seed))
  low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
  return Estimate(average, float(low), float(high))


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


def bootstrap_ratio(
  parts: np.ndarray,
  wholes: np.ndarray,
  seed: int,
  design: Design | None = None,
) -> Estimate | None:
  """Estimates mean(parts) / mean(wholes), both means over the same draws, see `bootstrap_mean`.

  Args:
    parts: One per measurement, for example 1 where a "yes" is right, [n].
    wholes: Likewise, for example 1 where the answer is "yes", [n].
    seed: Seed of the draws.
    design: How the measurements were drawn.

  Returns:
    The estimate; without an interval where a draw has no whole, None where there is none at all.
  """
  return _bootstrap_statistic([parts, wholes], _ratio, seed, design)


def bootstrap_ratio_difference(
  before: tuple[np.ndarray, np.ndarray],
  after: tuple[np.ndarray, np.ndarray],
  seed: int,
  design: Design | None = None,
) -> Estimate | None:
  """Estimates the ratio after minus the ratio before; each is (parts, wholes) of `bootstrap_ratio`.

  The draws are the same for both.
  """
  return _bootstrap_statistic(
    [*before, *after], _ratio_difference, seed, design
  )


def _ratio(means: np.ndarray) -> np.ndarray:
  """Returns means[0] / means[1], NaN where that is 0 / 0; means are [2, ...]."""
  part, whole = means
  return np.divide(
    part, whole, out=np.full_like(part, np.nan), where=whole != 0
  )


def _ratio_difference(means: np.ndarray) -> np.ndarray:
  """Returns the ratio of means[2:] minus that of means[:2]."""
  return _ratio(means[2:]) - _ratio(means[:2])


def _bootstrap_statistic(
  columns: Sequence[np.ndarray],
  statistic: Callable[[np.ndarray], np.ndarray],
  seed: int,
  design: Design | None,
) -> Estimate | None:
  """Estimates a statistic of the means of several columns over the same draws.

  Args:
    columns: Values of every column, [k, n].
    statistic: Maps means [k, ...] to values [...].
    seed: Seed of the draws.
    design: As in `bootstrap_mean`.

  Returns:
    The estimate, None where its value is NaN.
  """
  values = np.asarray(columns, np.float64)
  if design is None:
    num_values = values.shape[1]
    design = Design(range(num_values), [0] * num_values)
  point = float(statistic(np.array([mean(row, design) for row in values])))
  if np.isnan(point):
    return None
  if _num_clusters(design) < MIN_CLUSTERS:
    return Estimate(point)
  means = [resampled_means(row, seed, design) for row in values]
  drawn = statistic(np.array(means))
  if np.isnan(drawn).any():
    return Estimate(point)
  low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
  return Estimate(point, float(low), float(high))

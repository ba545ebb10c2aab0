"""Estimates differences of arms over prompts and seeds, and says which claims are held.

The criteria are fixed here. With d the difference that a claim is about and `least` the smallest
that matters, the claim "more" is

- *not held* where d < `least` is sure,
- *held* where d > 0 is sure, and d < `least` is not,
- *undecided* otherwise, with fewer than two seeds, and where all draws are equal.

"Not more" is held where d < `least` is sure; else not held where d > 0 is sure. "Less" is "more" of
-d.

Sure means: the share of bootstrap draws that say the opposite, corrected by Holm's method for the
number of claims of the study, is below 0.025 (one-sided; two-sided intervals of 95 % have the same
tails). A draw draws prompts, tag by tag, and seeds, each with replacement; all arms have the same
draws. Draws of few seeds vary too little: the deviations of S seeds are multiplied by
sqrt(S / (S - 1)) t / z, with t and z the quantiles of Student's distribution of S - 1 degrees and
of the normal one, so that an interval over seeds alone is about as wide as Student's.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Literal

import numpy as np
from scipy import special

from r3jax.evaluation import bootstrap
from r3jax.study import declarations
from r3jax.study import measures

Claim = declarations.Claim
Estimate = bootstrap.Estimate

LEVEL = 0.025
MIN_SEEDS = 2
_NO_WIDTH = 1e-9  # of draws of scores, which are of the size of 1
# seed of a run -> its values; the model before training has the key None alone
Values = Mapping[int | None, measures.Measured]


@dataclasses.dataclass(frozen=True)
class Draws:
  """A number, and what it is in other draws of prompts and seeds.

  Attributes:
    mean: The number.
    draws: Its values in the draws, [R].
    num_seeds: Number of seeds behind it.
  """

  mean: float
  draws: np.ndarray
  num_seeds: int

  @property
  def has_width(self) -> bool:
    """Whether the draws differ by more than rounding: equal ones measured no uncertainty."""
    return bool(np.ptp(self.draws) > _NO_WIDTH)

  def estimate(self) -> Estimate:
    """Returns the number with the interval of its draws; without one where they are all equal."""
    if not self.has_width:
      return Estimate(self.mean)
    low, high = np.quantile(self.draws, [LEVEL, 1 - LEVEL])
    return Estimate(self.mean, float(low), float(high))


def over_seeds(
  values: np.ndarray, design: bootstrap.Design, seed: int
) -> Draws:
  """Returns the mean over prompts and seeds with its draws.

  Args:
    values: One per seed of training and measurement, [S, n]; no NaN.
    design: How the measurements were drawn, as in `bootstrap_mean`.
    seed: Seed of the draws.
  """
  num_seeds = len(values)
  by_seed = np.stack(
    [bootstrap.resampled_means(row, seed, design) for row in values]
  )
  num_draws = by_seed.shape[1]
  mean = float(np.mean([bootstrap.mean(row, design) for row in values]))
  if num_seeds == 1:
    return Draws(mean, by_seed[0], num_seeds)
  # Not the stream that draws prompts.
  rng = np.random.default_rng((seed, num_seeds))
  chosen = rng.integers(num_seeds, size=(num_draws, num_seeds))
  drawn = by_seed[chosen, np.arange(num_draws)[:, None]].mean(1)
  center = by_seed.mean(0)
  student = special.stdtrit(num_seeds - 1, 1 - LEVEL)
  normal = special.ndtri(1 - LEVEL)
  scale = np.sqrt(num_seeds / (num_seeds - 1)) * student / normal
  return Draws(mean, center + scale * (drawn - center), num_seeds)


def of_arm(values: Values, seed: int) -> Draws | None:
  """Returns the mean of an arm; None where nothing is measured."""
  return _paired(values, None, seed)


def difference(arm: Values, other: Values, seed: int) -> Draws | None:
  """Returns the mean of an arm minus that of another, run by run of equal seeds.

  Args:
    arm: Values by seed.
    other: Likewise. One value alone, of the model before training, stands for all seeds.
    seed: Seed of the draws.

  Returns:
    The difference; None where no seed has both.
  """
  return _paired(arm, other, seed)


def _paired(arm: Values, other: Values | None, seed: int) -> Draws | None:
  """Returns the draws of an arm, or of its difference from another."""
  rows = []
  design = None
  for number, measured in arm.items():
    row = measured.values
    if other is not None:
      partner = _partner(other, number)
      if partner is None:
        continue
      row = row - partner.values
    rows.append(row)
    design = measured.design
  if design is None:
    return None
  values = np.stack(rows)
  # What is missing in one run counts in none.
  columns = np.flatnonzero(np.isfinite(values).all(0))
  if not columns.size:
    return None
  present = bootstrap.Design(
    clusters=[design.clusters[i] for i in columns],
    strata=[design.strata[i] for i in columns],
  )
  return over_seeds(values[:, columns], present, seed)


def _partner(values: Values, number: int | None) -> measures.Measured | None:
  """Returns the values of a seed, or those of the model before training."""
  if set(values) == {None}:
    return values[None]
  return values.get(number)


# --- Verdicts -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What a study says of a claim.

  Attributes:
    claim: The claim.
    difference: Arm minus other with its uncorrected interval; None where it is not measured yet.
    num_seeds: Number of seeds behind it.
    p_held: Corrected p-value of what must be refuted for "held".
    p_not_held: Corrected p-value of what must be refuted for "not held".
    verdict: "held", "not held" or "undecided".
  """

  claim: Claim
  difference: Estimate | None
  num_seeds: int
  p_held: float
  p_not_held: float
  verdict: Literal["held", "not held", "undecided"]


def holm(p_values: Sequence[float]) -> list[float]:
  """Returns p-values corrected for their number by Holm's method (Holm 1979).

  The i-th smallest of m is multiplied by m - i + 1, and is no smaller than those before it.
  """
  order = np.argsort(p_values, kind="stable")
  corrected = [0.0] * len(p_values)
  largest = 0.0
  for rank, index in enumerate(order):
    factor = len(p_values) - rank
    largest = max(largest, min(1.0, factor * p_values[index]))
    corrected[index] = largest
  return corrected


def _share(says_opposite: np.ndarray) -> float:
  """Returns the p-value of a share of draws, never 0."""
  return (1 + int(says_opposite.sum())) / (1 + len(says_opposite))


def _p_values(claim: Claim, draws: Draws | None) -> tuple[float, float]:
  """Returns the p-values of "d is not above 0" and of "d is not below `least`"."""
  if draws is None or draws.num_seeds < MIN_SEEDS or not draws.has_width:
    return 1.0, 1.0
  sign = -1 if claim.says == "less" else 1
  values = sign * draws.draws
  return _share(values <= 0), _share(values >= claim.least)


def judge(
  claims: Sequence[Claim], draws: Sequence[Draws | None]
) -> list[Verdict]:
  """Returns the verdicts on the claims of a study, corrected for their number.

  Args:
    claims: All claims of the study.
    draws: The difference that each is about, None where it is not measured yet.
  """
  pairs = [
    _p_values(claim, numbers)
    for claim, numbers in zip(claims, draws, strict=True)
  ]
  above = holm([pair[0] for pair in pairs])
  below = holm([pair[1] for pair in pairs])
  verdicts = []
  for i, claim in enumerate(claims):
    is_positive = above[i] < LEVEL
    is_small = below[i] < LEVEL
    denies = claim.says == "not more"
    if is_small:
      verdict = "held" if denies else "not held"
    elif is_positive:
      verdict = "not held" if denies else "held"
    else:
      verdict = "undecided"
    numbers = draws[i]
    verdicts.append(
      Verdict(
        claim=claim,
        difference=numbers.estimate() if numbers else None,
        num_seeds=numbers.num_seeds if numbers else 0,
        p_held=below[i] if denies else above[i],
        p_not_held=above[i] if denies else below[i],
        verdict=verdict,
      )
    )
  return verdicts

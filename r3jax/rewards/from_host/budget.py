"""The budget of missing scores: how many images may have none before a run stops."""

import collections
from collections.abc import Mapping
import re

# The stages' metrics "reason/valid", "edit/valid", "edit2/valid", ...
_VALID_SHARE = re.compile(r"(reason|edit\d*)/valid")


class BudgetExceeded(RuntimeError):
  """Too many images have no score for training to mean anything."""


class Budget:
  """Watches the share of images without a score over the last iterations.

  The run may continue as long as the images without a score in the last `window` iterations are at
  most `max_failed_fraction` of all images of `window` iterations. A run therefore survives a
  complete outage of max_failed_fraction * window iterations, whenever it happens.
  """

  def __init__(self, max_failed_fraction: float, window: int):
    """Starts without failures.

    Args:
      max_failed_fraction: in [0, 1].
      window: a number of iterations, at least 1.

    Raises:
      ValueError: the fraction is outside [0, 1], or the window is empty.
    """
    if not 0 <= max_failed_fraction <= 1:
      raise ValueError(
        f"reward.max_failed_fraction must be in [0, 1]; got {max_failed_fraction}"
      )
    if window < 1:
      raise ValueError(
        f"reward.failure_window must be at least 1 iteration; got {window}"
      )
    self._max_failed_fraction = max_failed_fraction
    self._window = window
    self._failed = collections.deque(maxlen=window)

  def add(self, failed: float) -> bool:
    """Adds an iteration, and returns whether the budget is exceeded.

    Args:
      failed: share of the iteration's images without a score, in [0, 1].
    """
    self._failed.append(failed)
    # Sums of shares such as 0.1 are above the limit by rounding alone.
    return self._share > self._max_failed_fraction + 1e-9

  @property
  def _share(self) -> float:
    return sum(self._failed) / self._window

  def error(self) -> BudgetExceeded:
    """Returns the error of a run whose budget is exceeded."""
    return BudgetExceeded(
      f"images without a score must be at most {self._max_failed_fraction:.3g} of those of "
      f"{self._window} iterations (reward.max_failed_fraction, reward.failure_window); in the last "
      f"{len(self._failed)} they were {self._share:.3g} of that number. See to the reward service "
      "and start again: the run goes on from its checkpoint"
    )


def check_evaluation(missing: float, max_failed_fraction: float) -> None:
  """Checks that enough images of an evaluation have a score.

  Args:
    missing: share of the scores that are missing, in [0, 1].
    max_failed_fraction: the config's limit of it.

  Raises:
    BudgetExceeded: more are missing.
  """
  if missing > max_failed_fraction:
    raise BudgetExceeded(
      f"images without a score must be at most {max_failed_fraction:.3g} of an evaluation "
      f"(reward.max_failed_fraction); they were {missing:.3g}. See to the reward service and start "
      "again: what has a score is kept, the rest is tried again"
    )


def failed_share(metrics: Mapping[str, float]) -> float:
  """Returns the share of an iteration's images without a score, the mean over its stages.

  It is 0 where an update was not finite: scores are then missing because images are not finite, and
  `run.health` counts such iterations.
  """
  if metrics.get("optimizer/skipped", 0):
    return 0.0
  shares = [
    1 - float(value)
    for name, value in metrics.items()
    if _VALID_SHARE.fullmatch(name)
  ]
  return sum(shares) / len(shares)

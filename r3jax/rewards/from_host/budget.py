"""How much of a reward may be missing before a run stops."""

import collections
import re


class BudgetExceeded(RuntimeError):
  """Too many images got no score for training to mean anything."""


class Budget:
  """Watches the share of images without a score over the last iterations.

  The run may go on as long as the images that failed in the last `window` iterations are at most
  `max_failed_fraction` of all that `window` iterations make. A complete outage is so survived for
  max_failed_fraction * window iterations, wherever in the run it falls.
  """

  def __init__(self, max_failed_fraction: float, window: int):
    """Starts with nothing failed.

    Raises:
      ValueError: the fraction is no share, or the window is empty.
    """
    if not 0 <= max_failed_fraction <= 1:
      raise ValueError(
        f"reward.max_failed_fraction must be in [0, 1]; got {max_failed_fraction}"
      )
    if window < 1:
      raise ValueError(
        f"reward.failure_window must be at least 1 iteration; got {window}"
      )
    self._max_failed_fraction, self._window = max_failed_fraction, window
    self._failed = collections.deque(maxlen=window)

  def add(self, failed: float) -> bool:
    """Books an iteration of whose images the share `failed` got no score; tells if that is too much."""
    self._failed.append(failed)
    return self._share > self._max_failed_fraction + 1e-9

  @property
  def _share(self) -> float:
    return sum(self._failed) / self._window

  def error(self) -> BudgetExceeded:
    """Returns the error of a run that stops for it."""
    return BudgetExceeded(
      f"images without a score must be at most {self._max_failed_fraction:.3g} of those of {self._window} "
      f"iterations (reward.max_failed_fraction, reward.failure_window); in the last {len(self._failed)} "
      f"they were {self._share:.3g} of that number. See to the reward service and start again: the run "
      "goes on from its checkpoint"
    )


def check_evaluation(missing: float, max_failed_fraction: float):
  """Raises BudgetExceeded where too many images of an evaluation have no score.

  Args:
    missing: share of the scores that are not there.
    max_failed_fraction: of the config.
  """
  if missing > max_failed_fraction:
    raise BudgetExceeded(
      f"images without a score must be at most {max_failed_fraction:.3g} of an evaluation "
      f"(reward.max_failed_fraction); they were {missing:.3g}. See to the reward service and start again: "
      "what has a score is kept, the rest is tried again"
    )


def failed_share(metrics: dict) -> float:
  """Returns the share of an iteration's images without a score, the mean over its stages."""
  shares = [
    1 - float(value)
    for name, value in metrics.items()
    if re.fullmatch(r"(reason|edit\d*)/valid", name)
  ]
  return sum(shares) / len(shares)

"""Tests of rewards/from_host/budget.py."""

import pytest

from r3jax.rewards.from_host import budget as budget_lib


def first_stop(failed, fraction=0.2, window=10):
  """Returns the number of the iteration that is too much, None if none is."""
  budget = budget_lib.Budget(fraction, window)
  return next(
    (i for i, share in enumerate(failed, 1) if budget.add(share)), None
  )


class TestBudget:
  @pytest.mark.parametrize(
    "failed, stop",
    [
      ([0.0] * 50, None),
      ([0.2] * 50, None),  # exactly the fraction, for ever
      ([0.21] * 50, 10),
      ([1.0] * 50, 3),  # an outage is survived for fraction * window iterations
      ([1.0, 1.0] + [0.0] * 50, None),
      # the first ones have left the window
      ([1.0, 1.0] + [0.0] * 8 + [1.0, 1.0] + [0.0] * 9, None),
      ([1.0, 1.0] + [0.0] * 7 + [1.0], 10),
    ],
  )
  def test_stops_when_the_window_holds_too_much(self, failed, stop):
    assert first_stop(failed) == stop

  def test_nothing_may_fail(self):
    assert first_stop([0.0, 0.0, 1e-3], fraction=0.0) == 3

  def test_error_says_what_was_seen_and_what_to_do(self):
    budget = budget_lib.Budget(0.2, 10)
    assert (
      budget.add(1.0) is False and budget.add(1.0) is False and budget.add(0.5)
    )
    message = str(budget.error())
    assert (
      "at most 0.2 of those of 10 iterations" in message
      and "0.25 of that number" in message
    )
    assert "goes on from its checkpoint" in message

  @pytest.mark.parametrize("fraction, window", [(-0.1, 5), (1.1, 5), (0.1, 0)])
  def test_bad_setting_is_refused(self, fraction, window):
    with pytest.raises(ValueError, match="must be"):
      budget_lib.Budget(fraction, window)


class TestFailedShare:
  def test_is_none_of_the_reward_where_images_are_not_finite(self):
    metrics = {"reason/valid": 0.0, "edit/valid": 0.0, "optimizer/skipped": 1.0}
    assert budget_lib.failed_share(metrics) == 0

  def test_is_the_mean_over_the_stages(self):
    assert (
      budget_lib.failed_share(
        {
          "reason/valid": 0.5,
          "edit/valid": 1.0,
          "edit/score": 0.1,
          "edit/x/valid": 0.0,
        }
      )
      == 0.25
    )


class TestCheckEvaluation:
  def test_too_few_scores_are_no_evaluation(self):
    budget_lib.check_evaluation(0.2, 0.2)
    with pytest.raises(
      budget_lib.BudgetExceeded,
      match="at most 0.2 of an evaluation .* they were 0.21",
    ):
      budget_lib.check_evaluation(0.21, 0.2)

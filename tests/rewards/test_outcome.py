"""Tests of rewards/outcome.py."""

import numpy as np
import pytest

from r3jax.rewards import outcome


class TestOk:
  @pytest.mark.parametrize("score", [-0.1, 1.1, float("nan"), float("inf")])
  def test_score_outside_of_the_range_is_refused(self, score):
    with pytest.raises(ValueError, match=r"a score must be in \[0, 1\]"):
      outcome.Ok(score)

  def test_part_that_is_no_number_is_refused(self):
    with pytest.raises(
      ValueError, match=r"part strict of a score must be in \[0, 1\]; got nan"
    ):
      outcome.Ok(0.5, {"strict": float("nan")})


@pytest.mark.parametrize("kind", [outcome.Failed, outcome.Invalid])
def test_reason_is_not_longer_than_a_screen(kind):
  reason = kind("begin " + "x" * 10**6 + " end").reason
  assert len(reason) == 2000
  assert reason.startswith("begin") and reason.endswith("end")


@pytest.mark.parametrize("kind", [outcome.Failed, outcome.Invalid])
def test_reason_does_not_move_the_cursor(kind):
  assert kind("a\x1b[2Jb\x9bc\nd é\u200d").reason == "a [2Jb c\nd é\u200d"


class TestToScore:
  def test_what_failed_is_missing_and_never_zero(self):
    outcomes = [
      outcome.Ok(0.25, {"strict": 0.0}),
      outcome.Failed("down"),
      outcome.Invalid("no verdict"),
      outcome.Ok(1.0, {"strict": 1.0}),
    ]
    found = outcome.to_score(outcomes, ("strict",))
    assert found.valid.tolist() == [True, False, False, True]
    np.testing.assert_array_equal(
      found.value, np.float32([0.25, np.nan, -np.inf, 1])
    )
    np.testing.assert_array_equal(
      found.parts["strict"], np.float32([0, np.nan, -np.inf, 1])
    )
    assert found.value.dtype == np.float32

  def test_other_parts_are_refused(self):
    with pytest.raises(
      ValueError, match=r"must give the parts \['strict'\]; got \['correct'\]"
    ):
      outcome.to_score([outcome.Ok(1.0, {"correct": 1.0})], ("strict",))


class TestToJson:
  def test_says_what_happened(self):
    assert outcome.to_json(
      outcome.Ok(0.5, {"strict": 0.0}, {"answer": "yes"})
    ) == {
      "status": "ok",
      "score": 0.5,
      "parts": {"strict": 0.0},
      "detail": {"answer": "yes"},
    }
    assert outcome.to_json(outcome.Failed("down")) == {
      "status": "failed",
      "reason": "down",
    }
    assert outcome.to_json(outcome.Invalid("blank")) == {
      "status": "invalid",
      "reason": "blank",
    }

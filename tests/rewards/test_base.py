"""Tests of rewards/base.py."""

import numpy as np
import pytest

from r3jax.rewards import base


class TestOk:

  @pytest.mark.parametrize("score", [-0.1, 1.1, float("nan"), float("inf")])
  def test_score_outside_of_the_range_is_refused(self, score):
    with pytest.raises(ValueError, match=r"a score must be in \[0, 1\]"):
      base.Ok(score)

  def test_part_that_is_no_number_is_refused(self):
    with pytest.raises(ValueError, match=r"part strict of a score must be in \[0, 1\]; got nan"):
      base.Ok(0.5, {"strict": float("nan")})


class TestToScore:

  def test_what_failed_is_missing_and_never_zero(self):
    outcomes = [base.Ok(0.25, {"strict": 0.0}), base.Failed("down"), base.Invalid("no verdict"), base.Ok(1.0, {"strict": 1.0})]
    found = base.to_score(outcomes, ("strict",))
    assert found.valid.tolist() == [True, False, False, True]
    np.testing.assert_array_equal(found.value, np.float32([0.25, np.nan, np.nan, 1]))
    np.testing.assert_array_equal(found.parts["strict"], np.float32([0, np.nan, np.nan, 1]))
    assert found.value.dtype == np.float32

  def test_other_parts_are_refused(self):
    with pytest.raises(ValueError, match=r"must give the parts \['strict'\]; got \['correct'\]"):
      base.to_score([base.Ok(1.0, {"correct": 1.0})], ("strict",))


class TestToJson:

  def test_says_what_happened(self):
    assert base.to_json(base.Ok(0.5, {"strict": 0.0}, {"answer": "yes"})) == {
        "status": "ok", "score": 0.5, "parts": {"strict": 0.0}, "detail": {"answer": "yes"}}
    assert base.to_json(base.Failed("down")) == {"status": "failed", "reason": "down"}
    assert base.to_json(base.Invalid("blank")) == {"status": "invalid", "reason": "blank"}

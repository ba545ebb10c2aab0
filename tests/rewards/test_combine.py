"""Tests of rewards/combine.py."""

import jax.numpy as jnp
import numpy as np
import pytest

from r3jax import types
from r3jax.files import jsonl
from r3jax.rewards import combine
from r3jax.rewards.from_host import scorer as scorer_lib

IMAGES = jnp.zeros((3, 2, 2, 3), jnp.uint8)


def fixed(
  values, valid=(True, True, True), strict=(0.0, 0.0, 0.0)
) -> combine.GraphReward:
  score = types.Score(
    jnp.float32(values), jnp.array(valid), {"strict": jnp.float32(strict)}
  )
  return combine.GraphReward(
    lambda records: np.arange(len(records)),
    lambda mesh: lambda images, target, needed=None: score,
    ("strict",),
  )


class TestWeightedSum:
  def test_is_the_weighted_mean_with_its_parts(self):
    one, two = (
      fixed([1, 0.5, 0], strict=[1, 1, 0]),
      fixed([1, 0, 1], strict=[1, 0, 1]),
    )
    reward = combine.weighted_sum(
      {"a": combine.Weighted(3.0, one), "b": combine.Weighted(1.0, two)}
    )
    target = reward.encode([{}] * 3)
    assert {name: rows.tolist() for name, rows in target.items()} == {
      "a": [0, 1, 2],
      "b": [0, 1, 2],
    }
    found = reward.on(None)(IMAGES, target)
    np.testing.assert_allclose(found.value, [1, 0.375, 0.25])
    assert found.parts["strict"].tolist() == [1, 0, 0]
    assert (
      set(found.parts)
      == {"a", "b", "a/strict", "b/strict", "strict"}
      == set(reward.parts)
    )
    assert found.parts["b"].tolist() == [1, 0, 1]

  def test_sample_is_missing_where_a_part_is(self):
    one, two = (
      fixed([1, 1, 1], valid=[True, False, True]),
      fixed([1, 1, np.nan], valid=[True, True, False]),
    )
    found = combine.weighted_sum(
      {"a": combine.Weighted(1.0, one), "b": combine.Weighted(1.0, two)}
    ).on(None)(IMAGES, {"a": 0, "b": 0})
    assert found.valid.tolist() == [True, False, False]

  def test_perfect_parts_make_exactly_one(self):
    members = {
      str(i): combine.Weighted(weight, fixed([1, 1, 1]))
      for i, weight in enumerate((0.1, 0.7, 0.3, 1e-3, 2.6))
    }
    found = combine.weighted_sum(members).on(None)(
      IMAGES, dict.fromkeys(members, 0)
    )
    assert found.value.tolist() == [1, 1, 1]

  @pytest.mark.parametrize(
    "members, message",
    [
      ({}, "reward.members must name at least one"),
      (
        {"strict": combine.Weighted(1.0, fixed([1, 1, 1]))},
        "must hold no slash and not be 'strict'",
      ),
      (
        {"a": combine.Weighted(0.0, fixed([1, 1, 1]))},
        "reward.members.a.weight must be above 0; got 0.0",
      ),
    ],
  )
  def test_bad_members_are_refused(self, members, message):
    with pytest.raises(ValueError, match=message):
      combine.weighted_sum(members)

  def test_invalid_member_is_told_from_one_that_failed(self):
    eye = fixed([1, 1, 1])
    judge = fixed([1, -np.inf, np.nan], valid=[True, False, False])
    members = {
      "eye": combine.Weighted(1.0, eye),
      "judge": combine.Weighted(1.0, judge),
    }
    reward = combine.weighted_sum(members)
    found = reward.on(None)(IMAGES, reward.encode([{}] * 3))
    assert found.valid.tolist() == [True, False, False]
    np.testing.assert_array_equal(found.value, [1, -np.inf, np.nan])
    np.testing.assert_array_equal(found.parts["judge"], [1, -np.inf, np.nan])


class TestLoweredByClutter:
  def reward(self) -> combine.GraphReward:
    score = types.Score(
      value=jnp.float32([1, 1, 0.5]),
      valid=jnp.array([True, True, True]),
      parts={
        "strict": jnp.float32([1, 0, 0]),
        "clutter": jnp.float32([0, 1 / 9, 2 / 9]),
      },
    )
    return combine.GraphReward(
      lambda records: np.arange(len(records)),
      lambda mesh: lambda images, target, needed=None: score,
      ("strict", "clutter"),
    )

  def test_weight_nine_counts_an_unreadable_cell_as_an_object_too_many(self):
    lowered = combine.lowered_by_clutter(self.reward(), 9.0)
    found = lowered.on(None)(IMAGES, None)
    np.testing.assert_allclose(found.value, [1, 1 / 2, 0.5 / 3], rtol=1e-6)
    assert found.parts["strict"].tolist() == [1, 0, 0]
    assert lowered.parts == ("strict", "clutter")

  def test_weight_zero_changes_nothing(self):
    reward = self.reward()
    assert combine.lowered_by_clutter(reward, 0.0) is reward

  @pytest.mark.parametrize(
    "reward, weight, message",
    [
      (fixed([1, 1, 1]), 1.0, r"no part 'clutter': it is 1.0, .*\['strict'\]"),
      (fixed([1, 1, 1]), -1.0, "must be at least 0; got -1.0"),
      (fixed([1, 1, 1]), np.nan, "must be at least 0; got nan"),
    ],
  )
  def test_what_cannot_be_is_refused(self, reward, weight, message):
    with pytest.raises(ValueError, match=f"reward.clutter_weight.*{message}"):
      combine.lowered_by_clutter(reward, weight)


class TestTrainedBy:
  def test_part_becomes_the_value(self):
    found = combine.trained_by(
      fixed([0.7, 0.2, 1], strict=[0, 0, 1]), "strict"
    ).on(None)(IMAGES, None)
    assert found.value.tolist() == [0, 0, 1]
    np.testing.assert_allclose(found.parts["shaped"], [0.7, 0.2, 1])

  def test_score_changes_nothing(self):
    reward = fixed([0, 0, 0])
    assert combine.trained_by(reward, "score") is reward

  def test_unknown_part_is_refused(self):
    with pytest.raises(
      ValueError,
      match=r"reward.value must be 'score' or one of \['strict'\]; got 'beauty'",
    ):
      combine.trained_by(fixed([0, 0, 0]), "beauty")


class TestLogTo:
  def test_later_steps_are_dropped_also_of_processes_that_are_gone(
    self, tmp_path
  ):
    for name in ("a.0", "a.3", "a.b.1"):
      jsonl.append(
        tmp_path / f"{name}.jsonl", [{"step": step} for step in (1, 2, 3)]
      )
    foreign = (".DS_Store", "a.3.jsonl (copy)", "notes.txt", ".a.3.jsonl")
    for name in foreign:
      (tmp_path / name).write_text('{"step": 3}\n')
    scorer = scorer_lib.Scorer(None)
    combine.GraphReward(None, None, (), {"a": scorer}).log_to(tmp_path, 2)
    kept = {
      path.name: [line["step"] for line in jsonl.read(path)]
      for path in tmp_path.iterdir()
      if path.name not in foreign
    }
    assert all(
      (tmp_path / name).read_text() == '{"step": 3}\n' for name in foreign
    )
    assert kept == {
      "a.0.jsonl": [1, 2],
      "a.3.jsonl": [1, 2],
      "a.b.1.jsonl": [1, 2],
    }

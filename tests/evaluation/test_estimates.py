"""Tests of evaluation/estimates.py and comparison.py, with numbers by hand."""

import dataclasses

import numpy as np
import pytest

from r3jax.evaluation import comparison
from r3jax.evaluation import estimates
from r3jax.evaluation import sample_table

NAN = np.nan


def table(**changes) -> sample_table.SampleTable:
  """Returns three rounds of five images.

  They are right and stop; wrong and mended; mended late; worsened; wrong and stop.
  """
  score = np.array(
    [[1, 0.5, 0.0, 0.5, 0.2], [1, 1, 0.5, 0.25, 0.2], [1, 1, 1, NAN, 0.2]]
  )
  stop = np.array([[0, 0, 0, 0, 0], [1, 0, 0, 0, 1], [1, 1, 0, 0, 1]], bool)
  columns = dict(  # noqa: C408
    tags=["a", "a", "b", "b", "b"],
    prompts=["p", "q", "r", "r", "s"],
    score=score,
    parts={
      "strict": np.array([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, NAN, 0]]),
      "correct": np.array(
        [[1, 0, 0, 1, 0], [1, 1, 1, 0, 0], [1, 1, 1, NAN, 0]]
      ),
    },
    stop=stop,
    format=np.array([[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 1]], float),
    tokens=np.array(
      [[4, 6, 5, 5, 5], [9, 10, 11, 12, 8], [1, 20, 22, 24, 1]], float
    ),
    instruction_tokens=np.array(
      [[0] * 5, [3, 4, 5, 6, 2], [0, 3, 4, 5, 0]], float
    ),
    chain_score=np.array(
      [
        [1, 0.5, 0.0, 0.5, 0.2],
        [0.5, 1, 0.5, 0.25, 0.6],
        [0.5, 0.75, 1, NAN, 0.8],
      ]
    ),
    says_stop=np.array(
      [[0, 0, 0, 0, 0], [1, 0, 0, 0, 1], [0, 1, 0, 0, 1]], bool
    ),
    seconds=np.array([[2.0] * 5, [3.0] * 5, [3.0, 3.0, 3.0, 9.0, 9.0]]),
  )
  return sample_table.SampleTable(**(columns | changes))


class TestByRound:
  def test_numbers_by_hand(self):
    draft, second, third = estimates.by_round(table(), seed=0)
    # Means of the tags' means: a (1 + 0.5) / 2, b (0 + 0.5 + 0.2) / 3.
    assert draft.score[0] == pytest.approx((0.75 + 0.7 / 3) / 2)
    # of b two images have a score
    assert third.score[0] == pytest.approx((1 + 1.2 / 2) / 2)
    assert draft.parts["strict"][0] == pytest.approx(0.25)
    assert draft.change is None
    assert (
      second.change.improved,
      second.change.worse,
      second.change.unchanged,
    ) == (
      2 / 5,
      1 / 5,
      2 / 5,
    )
    assert (
      third.change.improved,
      third.change.worse,
      third.change.unchanged,
    ) == (
      1 / 4,
      0,
      3 / 4,
    )
    assert second.change.gain[0] == pytest.approx((0.25 + 0.25 / 3) / 2)
    assert [one.finished for one in (draft, second, third)] == [
      0,
      2 / 5,
      3 / 5,
    ]

  def test_lengths_are_of_samples_that_were_open(self):
    _, second, third = estimates.by_round(table(), seed=0)
    assert (second.tokens, second.instruction_tokens) == (10, 4)
    assert (third.tokens, third.instruction_tokens, third.format) == (
      22,
      4,
      2 / 3,
    )

  def test_seconds_are_the_median(self):
    assert [one.seconds for one in estimates.by_round(table(), seed=0)] == [
      2,
      3,
      3,
    ]

  def test_all_finished_has_no_lengths(self):
    stop = np.ones((3, 5), bool)
    assert estimates.by_round(table(stop=stop), seed=0)[1].tokens is None

  def test_bounds_enclose_the_mean(self):
    rounds = estimates.by_round(table(prompts=[*"pqrst"]), seed=0)
    draft, second, third = (numbers.score for numbers in rounds)
    for mean, low, high in (draft, second):
      assert low <= mean <= high
    # One of five prompts has no score.
    assert third.interval is None

  def test_no_score_is_no_number(self):
    missing = np.full((3, 5), NAN)
    found = estimates.by_round(table(score=missing), seed=0)[1]
    assert (found.score, found.change.gain, found.change.improved) == (
      None,
      None,
      None,
    )


class TestByTag:
  def test_round_by_round(self):
    found = estimates.by_tag(table(), seed=0)
    assert list(found) == ["a", "b"]
    assert [value[0] for value in found["b"]] == pytest.approx(
      [0.7 / 3, 0.95 / 3, 0.6]
    )


class TestCorrectByTag:
  def test_is_the_share_of_correct_images_and_the_mean_of_the_tags(self):
    found = estimates.correct_by_tag(table(), seed=0)
    assert list(found) == ["all tags", "a", "b"]
    means = {tag: [one[0] for one in rounds] for tag, rounds in found.items()}
    assert means["a"] == pytest.approx([1 / 2, 1, 1])
    # In the last round an image has no score.
    assert means["b"] == pytest.approx([1 / 3, 1 / 3, 1 / 2])
    assert means["all tags"] == pytest.approx([5 / 12, 2 / 3, 3 / 4])
    rounds = estimates.by_round(table(), seed=0)
    assert found["all tags"] == [one.parts["correct"] for one in rounds]

  def test_of_a_sum_is_that_of_its_only_member_that_says_so(self):
    parts = table().parts
    correct = parts["correct"]
    in_sum = table(parts={"strict": parts["strict"], "g/correct": correct})
    assert in_sum.correct is correct
    twice = table(parts={"a/correct": correct, "b/correct": correct})
    assert twice.correct is None
    assert estimates.correct_by_tag(twice, seed=0) == {}


class TestStops:
  def test_numbers_by_hand(self):
    second, third = estimates.stops(table(), seed=0).rounds
    assert (second.right, second.wrong) == (1, 4)
    assert (
      second.stop_when_right,
      second.stop_when_wrong,
      second.stop_precision,
    ) == (1, 1 / 4, 1 / 2)
    # Open before the third: images 1 (right now), 2, 3.
    assert (third.right, third.wrong) == (1, 2)
    assert (
      third.stop_when_right,
      third.stop_when_wrong,
      third.stop_precision,
    ) == (1, 0, 1)

  def test_what_stopping_is_worth(self):
    found = estimates.stops(table(), seed=0).score

    def mean(a, b):
      return pytest.approx((np.mean(a) + np.mean(b)) / 2)

    assert found["its own stops"][0] == mean([1, 1], [1, 0.2])
    # one chain lacks a score
    assert found["stopped at the draft"][0] == mean([1, 0.5], [0, 0.2])
    assert found["never stopped"][0] == mean([0.5, 0.75], [1, 0.8])
    assert found["stopped at the best image"][0] == mean([1, 1], [1, 0.8])

  def test_chains_that_end_with_their_stop_show_two_ways(self):
    whole = table()
    ending = table(chain_score=np.where(whole.stop, NAN, whole.score))
    assert whole.never_stops and not ending.never_stops
    found = estimates.stops(ending, seed=0)
    assert found.rounds == estimates.stops(whole, seed=0).rounds
    expected = estimates.stops(whole, seed=0).score
    assert found.score == {
      name: expected[name] for name in ("its own stops", "stopped at the draft")
    }

  def test_nothing_open_has_no_shares(self):
    found = estimates.stops(table(stop=np.ones((3, 5), bool)), seed=0).rounds[0]
    assert (
      found.right,
      found.wrong,
      found.stop_when_right,
      found.stop_precision,
    ) == (0, 0, None, None)


class TestBehaviour:
  def test_counts_by_hand(self):
    found = estimates.behaviour(table())
    # Open before a round: five images, then images 1, 2, 3; edits: 1, 2, 3, then 2, 3 (score lost).
    assert found.edit_rate == 5 / 8
    # images 0 and 1 are right, 4 is not
    assert found.stop_precision == 2 / 3
    assert found.stop_when_right == 1.0
    assert found.stop_when_wrong == 1 / 6
    assert found.improvement == pytest.approx((0.5 + 0.5 - 0.25 + 0.5) / 4)
    assert found.improved == 3 / 4
    assert found.worse == 1 / 4
    assert found.finished == 3 / 5

  def test_nothing_edited_is_no_improvement(self):
    found = estimates.behaviour(
      table(
        score=np.ones((3, 5)), stop=np.array([[False] * 5] + [[True] * 5] * 2)
      )
    )
    assert (
      found.edit_rate,
      found.improvement,
      found.stop_precision,
    ) == (0.0, None, 1.0)


class TestCurveValues:
  def test_what_is_not_there_is_nan(self):
    found = estimates.curve_values(
      table(score=np.full((3, 5), NAN), chain_score=np.full((3, 5), NAN))
    )
    assert all(
      np.isnan(found[f"evaluation/{name}"])
      for name in ("draft", "gain", "tag/a", "stop_when_right", "improvement")
    )
    assert (
      found["evaluation/missing"] == 1.0
      and found["evaluation/finished"] == 3 / 5
    )

  def test_scores_are_means_of_the_tags_means(self):
    found = estimates.curve_values(table())
    assert found["evaluation/draft"] == pytest.approx((0.75 + 0.7 / 3) / 2)
    assert found["evaluation/tag/b"] == pytest.approx(0.6)
    assert found["evaluation/part/correct"] == pytest.approx(3 / 4)
    assert found["evaluation/correct/a"] == 1
    assert found["evaluation/correct/b"] == pytest.approx(1 / 2)
    assert found["evaluation/gain"] == pytest.approx(
      ((0 + 0.5) / 2 + (1 + 0) / 2) / 2
    )


class TestRefinement:
  def test_last_round_minus_draft(self):
    found = estimates.refinement(table(), seed=0)
    assert found.mean == pytest.approx(((0 + 0.5) / 2 + (1 + 0) / 2) / 2)
    assert found.interval is None  # of four prompts


class TestUnderstanding:
  def answers(self, kind, expected, given):
    number = len(expected)
    return sample_table.AnswerTable(
      ["a"] * number,
      [str(i) for i in range(number)],
      [kind] * number,
      expected,
      given,
    )

  def test_yes_or_no_by_hand(self):
    found = estimates.understanding(
      self.answers(
        "match",
        ["yes", "yes", "no", "no", "no"],
        ["yes", "no", "yes", "no", ""],
      ),
      0,
    )
    (one,) = found.values()
    assert one.questions == 5 and one.accuracy[0] == pytest.approx(2 / 5)
    assert (one.yes_or_no.precision, one.yes_or_no.recall) == pytest.approx(
      (1 / 2, 1 / 2)
    )
    assert (
      one.yes_or_no.says_yes,
      one.yes_or_no.always_yes,
      one.unread,
    ) == pytest.approx((2 / 5, 2 / 5, 1 / 5))
    assert (one.most_frequent, one.most_frequent_word) == (
      pytest.approx(3 / 5),
      "no",
    )

  def test_other_kinds_have_no_yes(self):
    found = estimates.understanding(
      self.answers("count", ["two", "one", "two"], ["two", "two", "two"]), 0
    )["count"]
    assert found.accuracy[0] == pytest.approx(2 / 3) == found.most_frequent
    assert found.yes_or_no is None

  def test_every_tag_weighs_the_same_in_all_shares(self):
    answers = sample_table.AnswerTable(
      ["a"] * 9 + ["b"],
      [str(i) for i in range(10)],
      ["match"] * 10,
      ["yes"] * 9 + ["no"],
      ["yes"] * 10,
    )
    one = estimates.understanding(answers, 0)["match"]
    assert (
      one.accuracy[0]
      == pytest.approx(0.5)
      == one.yes_or_no.always_yes
      == one.most_frequent
      == one.yes_or_no.precision
    )
    assert one.yes_or_no.recall == pytest.approx(1.0) == one.yes_or_no.says_yes

  def test_nothing_asked_is_nothing(self):
    assert estimates.understanding(self.answers("match", [], []), 0) == {}


class TestCompare:
  def test_difference_is_paired_and_leaves_missing_out(self):
    before = table()
    after = table(
      score=np.array(
        [[1, 1, 0.5, NAN, 0.2], [1, 1, 1, 1, 0.2], [1, 1, 1, 1, 1]]
      )
    )
    found = comparison.compare_pair(before, after, seed=0)
    assert found["draft"].before[0] == pytest.approx(
      ((1 + 0.5) / 2 + (0 + 0.2) / 2) / 2
    )
    assert found["draft"].after[0] == pytest.approx(
      ((1 + 1) / 2 + (0.5 + 0.2) / 2) / 2
    )
    assert found["draft"].difference[0] == pytest.approx(1.0 / 4)
    assert found["last round"].difference[0] == pytest.approx(0.8 / 4)
    # of the four images with a score
    assert found["last round, strict"].before[0] == pytest.approx(3 / 4)
    assert found["last round, b"].difference[0] == pytest.approx(0.8 / 2)
    assert found["draft, b, correct"].before[0] == pytest.approx(1 / 3)
    assert found["last round, a, correct"].before[0] == 1
    assert found["draft"].prompts == 4 and found["draft, b"].prompts == 2
    assert found["draft"].difference.interval is None

  def test_one_prompt_per_tag_gives_no_verdict_of_one_up_and_one_down(self):
    before = table(tags=[*"abcde"], prompts=[*"pqrst"])
    score = before.score + [0, 0.5, -0.25, 0, 0]
    found = comparison.compare_pair(
      before, dataclasses.replace(before, score=score), seed=0
    )
    mean, low, high = found["draft"].difference
    assert mean == pytest.approx(0.05) and low < 0 < high
    assert found["draft, b"].difference == (0.5, None, None)

  def test_tag_without_any_score_is_left_out(self):
    before = table()
    after = table(
      score=np.where(np.array(before.tags) == "a", NAN, before.score)
    )
    found = comparison.compare_pair(before, after, seed=0)
    assert "draft, a" not in found and "draft, b" in found

  def test_other_prompts_are_refused(self):
    with pytest.raises(ValueError, match="of the same prompts"):
      comparison.compare_pair(table(), table(prompts=["p"] * 5), seed=0)

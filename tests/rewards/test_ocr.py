"""Tests of rewards/serving/ocr.py."""

import itertools
import random

import pytest

from r3jax.data import records
from r3jax.rewards.serving import ocr


def box(text, left, top, width=40, height=20):
  return ocr.TextBox(text, left, top, left + width, top + height)


def line(text):
  return [box(text, 0, 0)]


class TestEditDistance:
  @pytest.mark.parametrize(
    "a, b, distance",
    [
      ("", "", 0),
      ("", "abc", 3),
      ("kitten", "sitting", 3),
      ("flaw", "lawn", 2),
      ("abcd", "abcd", 0),
      ("abcd", "dcba", 4),
    ],
  )
  def test_known_distances_in_both_directions(self, a, b, distance):
    assert ocr.edit_distance(a, b) == ocr.edit_distance(b, a) == distance

  def test_is_the_least_over_all_alignments(self):
    """The recursion that defines it, on every pair of short texts of two letters."""

    def slow(a, b):
      if not a or not b:
        return len(a) + len(b)
      replaced = slow(a[1:], b[1:]) + (a[0] != b[0])
      return min(replaced, slow(a[1:], b) + 1, slow(a, b[1:]) + 1)

    texts = []
    for length in range(4):
      texts += map("".join, itertools.product("ab", repeat=length))
    for a, b in itertools.product(texts, repeat=2):
      assert ocr.edit_distance(a, b) == slow(a, b)


class TestSubstringDistance:
  @pytest.mark.parametrize(
    "a, b, distance",
    [
      ("open", "", 4),
      ("open", "weareopendaily", 0),
      ("open", "weareopndaily", 1),
      ("open", "xyz", 4),
      ("a", "bbb", 1),
    ],
  )
  def test_text_around_costs_nothing(self, a, b, distance):
    assert ocr.substring_distance(a, b) == distance

  def test_is_the_least_over_all_substrings(self):
    rng = random.Random(0)
    for _ in range(50):
      a = "".join(rng.choices("abc", k=rng.randint(0, 4)))
      b = "".join(rng.choices("abc", k=rng.randint(0, 6)))
      cuts = itertools.combinations_with_replacement(range(len(b) + 1), 2)
      least = min(ocr.edit_distance(a, b[i:j]) for i, j in cuts)
      assert ocr.substring_distance(a, b) == least


class TestInReadingOrder:
  def test_lines_from_the_top_and_words_from_the_left(self):
    boxes = [
      box("PM", 60, 104),
      box("until", 0, 50),
      box("7:30", 0, 100),
      box("OPEN", 0, 8),
      box("DAILY", 60, 0),
    ]
    for shuffled in itertools.permutations(boxes):
      ordered = ocr.in_reading_order(shuffled)
      texts = " ".join(each.text for each in ordered)
      assert texts == "OPEN DAILY until 7:30 PM"

  def test_word_of_another_size_is_of_the_line_it_overlaps(self):
    boxes = [box("BIG", 50, 0, height=40), box("small", 0, 12, height=16)]
    assert ocr.in_reading_order(boxes) == [boxes[1], boxes[0]]

  def test_lines_that_touch_stay_apart(self):
    boxes = [box("two", 0, 15), box("one", 50, 0)]
    assert [each.text for each in ocr.in_reading_order(boxes)] == ["one", "two"]

  def test_boxes_that_are_equal_or_flat_are_all_there(self):
    flat = box("flat", 0, 0, height=0)
    boxes = [flat, box("same", 0, 0), box("same", 0, 0)]
    assert len(ocr.in_reading_order(boxes)) == 3


class TestJudge:
  @pytest.mark.parametrize(
    "inscription, read, score, anywhere",
    [
      ("Open Daily", "OPENDAILY", 1, 1),  # neither case nor blanks
      ("OPEN", "OPFN", 3 / 4, 3 / 4),
      ("OPEN", "OPEN OPEN", 1 / 2, 1),  # other text costs
      ("Gate 17", "Gate 71", 4 / 6, 5 / 6),  # "Gate 7" is nearer
      ("OPEN", "bus", 0, 0),
    ],
  )
  def test_score_is_one_minus_the_share_of_wrong_characters(
    self, inscription, read, score, anywhere
  ):
    result = ocr.judge(inscription, line(read))
    assert result.score == pytest.approx(score, abs=1e-12)
    assert result.parts["anywhere"] == pytest.approx(anywhere, abs=1e-12)
    assert result.parts["strict"] == float(score == 1)
    assert tuple(result.parts) == ocr.PARTS

  def test_image_without_text_has_the_score_zero(self):
    result = ocr.judge("OPEN", [])
    assert result.score == 0
    assert result.parts == {"strict": 0, "anywhere": 0}

  def test_detail_says_what_was_read(self):
    boxes = [box("DAILY", 60, 0), box("OPEN", 0, 0)]
    detail = ocr.judge("Open daily", boxes).detail
    assert (detail["asked"], detail["read"]) == ("Open daily", "OPEN DAILY")
    assert detail["confidences"] == [1, 1]


class TestCheckPrompt:
  def test_prompt_without_an_inscription_is_refused(self):
    ocr.check_prompt(records.Prompt("t", "p", inscription="x"))
    with pytest.raises(
      ValueError, match="the field inscription, or data.bench"
    ):
      ocr.check_prompt(records.Prompt("t", 'a mug, "hi"'))
    with pytest.raises(ValueError, match="must have visible characters"):
      ocr.check_prompt(records.Prompt("t", "p", inscription="\u200b"))

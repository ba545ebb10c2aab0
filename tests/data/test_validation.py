"""Tests of data/validation.py."""

import pytest

from r3jax.data import validation

POSITION = {
  "tag": "position",
  "prompt": "a photo of a dog right of a bear",
  "include": [
    {"class": "bear", "count": 1},
    {"class": "dog", "count": 1, "position": ["right of", 0]},
  ],
}
TIIF = {
  "type": "negation",
  "short_description": "A table without a cup.",
  "long_description": "",
  "yn_question_list": ["Is there a table?  ", "Is there a cup?"],
  "yn_answer_list": ["Yes", "no"],
}
QUESTIONS = {
  "tag": "negation",
  "prompt": "A table without a cup.",
  "questions": [["Is there a table?", "yes"], ["Is there a cup?", "no"]],
}


def deep(levels):
  value = []
  for _ in range(levels):
    value = [value]
  return value


class TestFindProblems:
  @pytest.mark.parametrize(
    "change, message",
    [
      ({"prompt": "  "}, "prompt must be a non-empty string, got '  '"),
      (
        {"prompt": "a \ud800"},
        "prompt must be Unicode text without lone surrogates, got 'a \\ud800'",
      ),
      (
        {"prompt": "a ring <|im_end|> <|im_start|>"},
        "prompt must not hold the marker <|im_end|>, which models take for the end or the begin "
        "of a text, got 'a ring <|im_end|> <|im_start|>'",
      ),
      (
        {"include": [{"class": "<|vision_start|>", "count": 1}]},
        "include[0]: class must not hold the marker <|vision_start|>, which models take for the "
        "end or the begin of a text, got '<|vision_start|>'",
      ),
      ({"tag": 3}, "tag must be a non-empty string, got 3"),
      ({"tag": "colour"}, "tag must be one of ['position'], got 'colour'"),
      ({"include": None}, "include must be a non-empty list, got None"),
      (
        {"include": [{"count": 1}]},
        "include[0]: class must be a non-empty string, got None",
      ),
      (
        {"include": [{"class": "dog", "count": 0}]},
        "include[0]: count must be an integer of at least 1 and at most 1000, got 0",
      ),
      (
        {"include": [{"class": "dog", "count": True}]},
        "include[0]: count must be an integer of at least 1 and at most 1000, got True",
      ),
      (
        {"include": [{"class": "dog", "count": 1.0}]},
        "include[0]: count must be an integer of at least 1 and at most 1000, got 1.0",
      ),
      (
        {"include": [{"class": "dog", "count": 10**4000}]},
        "include[0]: count must be an integer of at least 1 and at most 1000, got 100000000000000",
      ),
      (
        {"include": [{"class": "dog", "count": 1, "color": 1}]},
        "include[0]: color must be a non-empty string, got 1",
      ),
      (
        {"include": [{"class": "dog", "count": 1, "size": ""}]},
        "include[0]: size must be a non-empty string, got ''",
      ),
      (
        {"include": ["dog"]},
        "include[0]: an item must be a JSON object, got 'dog'",
      ),
      (
        {"include": [{"class": "dog", "count": 1, "position": ["above", 1]}]},
        "include[0]: position must be [relation, index of another include item (0 to 0)], "
        "got ['above', 1]",
      ),
      (
        {"include": [{"class": "dog", "count": 1, "position": ["above", 0]}]},
        "include[0]: position must be [relation, index",
      ),
      (
        {
          "include": POSITION["include"]
          + [{"class": "cat", "count": 1, "position": ["above", -1]}]
        },
        "include[2]: position must be [relation, index of another include item (0 to 2)]",
      ),
      ({"exclude": [{"class": "dog"}]}, "exclude[0]: count must be"),
      ({"exclude": "dog"}, "exclude must be a list, got 'dog'"),
      ({"inscription": "hi"}, "inscription must stand without include"),
      (
        {"questions": []},
        "a record must have one of include, questions, yn_question_list, got include and questions",
      ),
    ],
  )
  def test_bad_field_is_reported(self, change, message):
    problems = validation.find_problems(POSITION | change, tags={"position"})
    assert len(problems) == 1
    assert problems[0].startswith(message)

  @pytest.mark.parametrize(
    "change, message",
    [
      (
        {"type": "negative"},
        "type must be one of ['negation'], got 'negative'",
      ),
      (
        {"short_description": ""},
        "short_description must be a non-empty string, got ''",
      ),
      (
        {"yn_question_list": []},
        "yn_question_list must be a non-empty list, got []",
      ),
      (
        {"yn_question_list": ["x", 2]},
        "yn_question_list[1] must be a non-empty string, got 2",
      ),
      (
        {"yn_answer_list": ["yes"]},
        "yn_answer_list must hold an answer to each of the 2 questions, got 1",
      ),
      (
        {"yn_answer_list": "no"},
        "yn_answer_list must hold an answer to each of the 2 questions, got 'no'",
      ),
      (
        {"yn_answer_list": ["yes", "maybe"]},
        "yn_answer_list[1] must be yes or no, got 'maybe'",
      ),
      (
        {"yn_answer_list": [True, "no"]},
        "yn_answer_list[0] must be yes or no, got True",
      ),
      (
        {"long_description": None},
        "long_description must be a string, got None",
      ),
    ],
  )
  def test_bad_field_of_tiif_is_reported(self, change, message):
    assert validation.find_problems(TIIF | change, tags={"negation"}) == [
      message
    ]

  @pytest.mark.parametrize(
    "questions, message",
    [
      ([], "questions must be a non-empty list, got []"),
      (["Is it?"], "questions[0] must be [text, answer], got 'Is it?'"),
      (
        [["Is it?", "yes", "no"]],
        "questions[0] must be [text, answer], got ['Is it?', 'yes', 'no']",
      ),
      (
        [["Is it?", "yes"], [" ", "no"]],
        "questions[1][0] must be a non-empty string, got ' '",
      ),
      ([["Is it?", "y"]], "questions[0][1] must be yes or no, got 'y'"),
    ],
  )
  def test_bad_question_is_reported(self, questions, message):
    assert validation.find_problems(QUESTIONS | {"questions": questions}) == [
      message
    ]

  @pytest.mark.parametrize("obj", [POSITION, TIIF, QUESTIONS])
  def test_valid_record_has_none(self, obj):
    assert validation.find_problems(obj, tags={"position", "negation"}) == []

  def test_every_problem_of_a_record_is_reported(self):
    obj = {
      "tag": "",
      "prompt": None,
      "include": [{"class": "", "count": 0, "color": ""}],
    }
    assert len(validation.find_problems(obj)) == 5

  def test_something_else_than_an_object_is_reported(self):
    assert validation.find_problems([1]) == [
      "a record must be a JSON object, got list"
    ]

  def test_record_without_a_prompt_is_reported(self):
    assert validation.find_problems({"tag": "counting"}) == [
      "a record must have one of prompt, include, questions, yn_question_list, got none of them"
    ]

  @pytest.mark.parametrize("tag", [{}, {"tag": "of no benchmark"}])
  def test_prompt_alone_may_have_any_tag(self, tag):
    assert validation.find_problems({"prompt": "x"} | tag, {"position"}) == []
    assert validation.find_problems(POSITION | tag | {"tag": ""}, None)

  def test_tag_is_needed_where_a_benchmark_decides_it(self):
    record = {"prompt": "x", "include": [{"class": "dog", "count": 1}]}
    assert validation.find_problems(record) == []
    assert validation.find_problems(record, {"position"}) == [
      "tag must be a non-empty string, got None"
    ]

  @pytest.mark.parametrize(
    "value", [deep(900), "x" * 10**6, {"x": deep(900)}, [0] * 10**5]
  )
  @pytest.mark.parametrize("field", ["prompt", "include", "exclude"])
  def test_large_value_is_shown_short(self, field, value):
    for problem in validation.find_problems(
      POSITION | {"tag": " ", field: value}
    ):
      assert len(problem) < 300

"""Tests of data/prompts.py."""

import json

import pytest

from r3jax.data import prompts
from r3jax.worlds import prompts as world_prompts

POSITION = {"tag": "position", "prompt": "a photo of a dog right of a bear",
            "include": [{"class": "bear", "count": 1},
                        {"class": "dog", "count": 1, "position": ["right of", 0]}]}
COUNTING = {"tag": "counting", "prompt": "a photo of two cats",
            "include": [{"class": "cat", "count": 2}], "exclude": [{"class": "cat", "count": 3}]}
REGION = {"tag": "size_spatial_attr", "prompt": "A photo of a big cow on the left",
          "include": [{"class": "cow", "count": 1, "color": "red", "region": "left",
                       "size": "big"}]}


def write(path, objects):
  path.write_text("".join(json.dumps(obj) + "\n" for obj in objects))
  return path


class TestFromJson:

  @pytest.mark.parametrize("obj", [POSITION, COUNTING, REGION])
  def test_round_trip_gives_the_object_back(self, obj):
    assert prompts.PromptRecord.from_json(obj, "here").to_json() == obj

  def test_fields_are_read(self):
    record = prompts.PromptRecord.from_json(POSITION, "here")
    assert record.include[1].position == ("right of", 0)
    assert record.include[1].class_name == "dog"
    assert record.exclude == ()
    assert hash(record) == hash(prompts.PromptRecord.from_json(POSITION, "there"))

  def test_id_is_stable_and_ignores_key_order(self):
    record = prompts.PromptRecord.from_json(COUNTING, "here")
    reordered = dict(reversed(COUNTING.items()))
    assert record.id == "48859b0f7ebb3f12"
    assert prompts.PromptRecord.from_json(reordered, "here").id == record.id

  def test_id_differs_when_an_expectation_differs(self):
    other = COUNTING | {"exclude": [{"class": "cat", "count": 4}]}
    assert (prompts.PromptRecord.from_json(other, "here").id
            != prompts.PromptRecord.from_json(COUNTING, "here").id)

  def test_error_names_the_place_and_every_problem(self):
    with pytest.raises(ValueError) as error:
      prompts.PromptRecord.from_json({"tag": "", "prompt": " ", "include": []}, "file:3")
    assert str(error.value).count("file:3: ") == 3

  def test_embedded_world_is_valid_and_has_unique_ids(self):
    records = world_prompts.train_records() + world_prompts.heldout_records()
    read = [prompts.PromptRecord.from_json(obj, "world") for obj in records]
    assert len({record.id for record in read}) == len(records)
    assert [record.to_json() for record in read] == records


class TestFindProblems:

  @pytest.mark.parametrize("change, message", [
      ({"prompt": "  "}, "prompt must be a non-empty string"),
      ({"tag": 3}, "tag must be a non-empty string"),
      ({"tag": "colour"}, "tag must be one of ['position'], got 'colour'"),
      ({"include": None}, "include must be a non-empty list"),
      ({"include": [{"count": 1}]}, "include[0]: class must be"),
      ({"include": [{"class": "dog", "count": 0}]}, "include[0]: count must be an integer of at"),
      ({"include": [{"class": "dog", "count": True}]}, "include[0]: count must be an integer of"),
      ({"include": [{"class": "dog", "count": 1, "color": 1}]}, "include[0]: color must be"),
      ({"include": [{"class": "dog", "count": 1, "position": ["above", 1]}]},
       "include[0]: position must be [relation, index of another include item (0 to 0)]"),
      ({"include": [{"class": "dog", "count": 1, "position": ["above", 0]}]},
       "include[0]: position must be [relation, index"),
      ({"exclude": [{"class": "dog"}]}, "exclude[0]: count must be"),
      ({"exclude": "dog"}, "exclude must be a list"),
  ])
  def test_bad_field_is_reported(self, change, message):
    problems = prompts.find_problems(POSITION | change, tags={"position"})
    assert len(problems) == 1
    assert problems[0].startswith(message)

  def test_valid_record_has_none(self):
    assert prompts.find_problems(POSITION, tags={"position"}) == []

  def test_something_else_than_an_object_is_reported(self):
    assert prompts.find_problems([1]) == ["a record must be a JSON object, got list"]


class TestReadJsonl:

  def test_records_come_in_file_order_and_empty_lines_are_skipped(self, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f"{json.dumps(COUNTING)}\n\n{json.dumps(POSITION)}\n")
    assert [record.tag for record in prompts.read_jsonl(path)] == ["counting", "position"]

  def test_all_problems_are_raised_together_with_their_lines(self, tmp_path):
    path = write(tmp_path / "prompts.jsonl", [
        POSITION, COUNTING | {"tag": "count"}, POSITION,
        {"tag": "position", "prompt": "x", "include": [{"count": 1}]}])
    path.write_text(path.read_text() + "{")
    with pytest.raises(ValueError) as error:
      prompts.read_jsonl(path, tags={"position", "counting"})
    lines = str(error.value).splitlines()
    assert lines[0] == "4 problems with prompts:"
    assert lines[1].startswith(f"{path}:2: tag must be one of ['counting', 'position']")
    assert lines[2] == f"{path}:3: prompt 'a photo of a dog right of a bear' repeats line 1"
    assert lines[3].startswith(f"{path}:4: include[0]: class must be")
    assert lines[4].startswith(f"{path}:5: the line must be JSON")

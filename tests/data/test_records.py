"""Tests of data/records.py."""

import hashlib
import json
import random
import re

from absl import logging
import pytest

from r3jax.data import records as records_lib
from r3jax.worlds.shapes import prompts

POSITION = {
  "tag": "position",
  "prompt": "a photo of a dog right of a bear",
  "include": [
    {"class": "bear", "count": 1},
    {"class": "dog", "count": 1, "position": ["right of", 0]},
  ],
}
COUNTING = {
  "tag": "counting",
  "prompt": "a photo of two cats",
  "include": [{"class": "cat", "count": 2}],
  "exclude": [{"class": "cat", "count": 3}],
}
REGION = {
  "tag": "size_spatial_attr",
  "prompt": "A photo of a big cow on the left",
  "include": [
    {
      "class": "cow",
      "count": 1,
      "color": "red",
      "region": "left",
      "size": "big",
    }
  ],
}
TIIF = {
  "type": "negation",
  "short_description": " A table without a cup.",
  "long_description": "A long, bare table.",
  "yn_question_list": ["Is there a table?  ", "Is there a cup?"],
  "yn_answer_list": ["Yes", "no"],
  "source": "TIIF",
}
QUESTIONS = {
  "tag": "negation",
  "prompt": "A table without a cup.",
  "questions": [["Is there a table?", "yes"], ["Is there a cup?", "no"]],
}
STRICT_TAGS = records_lib.Reading(tags=("colors",))


def lines(*objects):
  return "".join(json.dumps(obj) + "\n" for obj in objects).encode()


def refusal(content, tags=None):
  with pytest.raises(ValueError) as error:
    records_lib.parse(content, "file", records_lib.Reading(tags))
  return str(error.value).splitlines()


class TestFromJson:
  @pytest.mark.parametrize("obj", [POSITION, COUNTING, REGION, QUESTIONS])
  def test_round_trip_gives_the_object_back(self, obj):
    assert records_lib.Prompt.from_json(obj, "here").to_json() == obj

  def test_fields_are_read(self):
    record = records_lib.Prompt.from_json(POSITION, "here")
    assert record.include[1].position == ("right of", 0)
    assert record.include[1].class_name == "dog"
    assert record.exclude == record.questions == ()
    assert hash(record) == hash(records_lib.Prompt.from_json(POSITION, "there"))

  def test_fields_of_tiif_are_read(self):
    record = records_lib.Prompt.from_json(TIIF, "here")
    assert (record.tag, record.text) == ("negation", "A table without a cup.")
    assert record.questions == (
      records_lib.Question("Is there a table?", "yes"),
      records_lib.Question("Is there a cup?", "no"),
    )
    assert record.include == record.exclude == ()

  def test_tiif_and_its_own_json_are_one_record(self):
    record = records_lib.Prompt.from_json(TIIF, "here")
    assert record.to_json() == QUESTIONS
    assert records_lib.Prompt.from_json(QUESTIONS, "there") == record

  def test_order_of_keys_does_not_matter(self):
    record = records_lib.Prompt.from_json(COUNTING, "here")
    reordered = dict(reversed(COUNTING.items()))
    assert records_lib.Prompt.from_json(reordered, "here") == record

  def test_further_keys_are_ignored(self):
    items = [COUNTING["include"][0] | {"comment": "\ud800"}]
    record = records_lib.Prompt.from_json(
      COUNTING | {"include": items, "split": 1}, "here"
    )
    assert record == records_lib.Prompt.from_json(COUNTING, "here")

  def test_prompts_differ_when_an_expectation_differs(self):
    other = COUNTING | {"exclude": [{"class": "cat", "count": 4}]}
    assert records_lib.Prompt.from_json(
      other, "here"
    ) != records_lib.Prompt.from_json(COUNTING, "here")

  def test_error_names_the_place_and_every_problem(self):
    with pytest.raises(ValueError) as error:
      records_lib.Prompt.from_json(
        {"tag": "", "prompt": " ", "include": []}, "file:3"
      )
    assert str(error.value).count("file:3: ") == 3

  def test_embedded_world_is_valid_and_has_no_prompt_twice(self):
    records = prompts.train_records() + prompts.heldout_records()
    read = [
      records_lib.Prompt.from_json(record.to_json(), "world")
      for record in records
    ]
    assert len(set(read)) == len(records)
    assert read == records


class TestPromptAlone:
  def test_text_file_has_a_prompt_a_line(self):
    content = 'a red cat\n\n  two dogs\u2028in the rain \r\n[style] x\r"a"'
    prompts = records_lib.parse(content.encode(), "file", STRICT_TAGS)
    assert [prompt.text for prompt in prompts] == [
      "a red cat",
      "two dogs\u2028in the rain",
      "[style] x",
      '"a"',
    ]
    assert {prompt.tag for prompt in prompts} == {records_lib.UNTAGGED}
    assert not any(prompt.include or prompt.questions for prompt in prompts)

  def test_json_needs_no_tag_and_may_have_any(self):
    content = lines({"prompt": "a cat"}, {"prompt": "a dog", "tag": "my own"})
    prompts = records_lib.parse(content, "file", STRICT_TAGS)
    assert [prompt.tag for prompt in prompts] == ["untagged", "my own"]
    again = [prompt.to_json() for prompt in prompts]
    assert again == [
      {"tag": "untagged", "prompt": "a cat"},
      {"tag": "my own", "prompt": "a dog"},
    ]
    assert list(map(records_lib.Prompt.from_json, again)) == prompts

  def test_lines_are_numbered_as_an_editor_numbers_them(self):
    content = b"\xef\xbb\xbf\n\na cat\n"
    ((line, prompt),) = records_lib.parse_numbered(content, "file")
    assert (line, prompt.text) == (3, "a cat")

  def test_text_that_repeats_is_refused(self):
    assert refusal(b"a cat\na dog\na cat\n")[1:] == [
      "file:3: prompt 'a cat' repeats line 1"
    ]

  def test_text_among_json_is_refused_unless_they_may_mix(self):
    content = lines(COUNTING) + b"a cat\n"
    assert refusal(content)[1].startswith("file:2: the line must be JSON")
    mixed = records_lib.Reading(mixed=True, repeats=True)
    prompts = records_lib.parse(content * 2, "file", mixed)
    assert [bool(prompt.include) for prompt in prompts] == [True, False] * 2

  def test_exclude_alone_is_refused(self):
    record = {"prompt": "a cat", "exclude": [{"class": "dog", "count": 1}]}
    assert refusal(lines(record))[1:] == [
      "file:1: exclude must stand beside include, which is missing"
    ]

  @pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
  def test_file_of_another_encoding_is_refused_by_name(self, encoding):
    (message,) = refusal("a red cat\n".encode(encoding))[1:]
    assert message.startswith("file:1: the text must be UTF-8; it")
    assert message.endswith("save it as UTF-8")

  def test_line_that_is_no_utf8_is_refused_by_its_number(self):
    assert refusal(b"a cat\na caf\xe9\n")[1].startswith(
      "file:2: the line must be UTF-8: 'utf-8' codec can't decode byte 0xe9"
    )


class TestSha256:
  def test_hash_is_that_of_the_json_in_the_order_of_the_prompts(self):
    prompts = [
      records_lib.Prompt.from_json(obj) for obj in (POSITION, QUESTIONS)
    ]
    text = json.dumps([POSITION, QUESTIONS])
    assert records_lib.sha256(prompts) == (
      hashlib.sha256(text.encode()).hexdigest()
    )
    assert records_lib.sha256(prompts) != records_lib.sha256(prompts[::-1])


class TestParse:
  def test_records_come_in_file_order_and_empty_lines_are_skipped(self):
    content = f"{json.dumps(COUNTING)}\n\n{json.dumps(POSITION)}\n".encode()
    prompts = records_lib.parse(content, "file")
    assert [prompt.tag for prompt in prompts] == ["counting", "position"]

  def test_problems_name_the_file(self):
    content = lines(POSITION, {"tag": "x"})
    with pytest.raises(ValueError, match="file:2: a record must have one of"):
      records_lib.parse(content, "file")

  def test_all_problems_are_raised_together_with_their_lines(self):
    content = lines(
      POSITION,
      COUNTING | {"tag": "count"},
      POSITION,
      {"tag": "position", "prompt": "x", "include": [{"count": 1}]},
    )
    message = refusal(content + b"{", tags={"position", "counting"})
    assert message == [
      "4 problems with prompts:",
      "file:2: tag must be one of ['counting', 'position'], got 'count'",
      "file:4: include[0]: class must be a non-empty string, got None",
      "file:5: the line must be JSON: Expecting property name enclosed in double quotes "
      "(column 2)",
      "file:3: prompt 'a photo of a dog right of a bear' repeats line 1",
    ]

  def test_no_more_than_fifty_problems_are_listed(self):
    message = refusal(b"[]\n" * 120)
    assert len(message) == 52
    assert message[0] == "120 problems with prompts:"
    assert message[50] == "file:50: a record must be a JSON object, got list"
    assert message[51] == "... and 70 more"

  @pytest.mark.parametrize(
    "line, problem",
    [
      (
        b'{"tag": "\xff"}',
        "'utf-8' codec can't decode byte 0xff in position 9: invalid start",
      ),
      (b'{"tag": NaN}', "NaN is no JSON number"),
      (b'{"tag": [-Infinity]}', "-Infinity is no JSON number"),
      (b'{"tag": "x", "a": {"b": 1, "b": 2}}', "key 'b' must stand once"),
      (b'{"tag": "x", "tag": "x"}', "key 'tag' must stand once"),
      (
        b'{"tag": ' + b"9" * 5000 + b"}",
        "a number must be finite as a float",
      ),
      (b'{"tag": ' + b"[" * 10**5, "it must be nested at most 50 levels deep"),
      (b'{"tag": ' + b'{"a":' * 10**5, "it must be nested at most 50 levels"),
      (
        b'{"tag": ' + b"[" * 60 + b"]" * 60 + b"}",
        "it must be nested at most 50 levels deep",
      ),
      (b'{"tag": 1e999}', "a number must be finite as a float; got 1e999"),
      (b'{"more": -1e999}', "a number must be finite as a float; got -1e999"),
      (b'{"tag": "x"} {"tag": "x"}', "Extra data (column 14)"),
      (b'\xef\xbb\xbf{"tag": "x"}', "Unexpected UTF-8 BOM"),
      (
        '{"tag": "x"}'.encode("utf-16"),
        "'utf-8' codec can't decode byte 0xff in position 0",
      ),
      (b"\0", "Expecting value (column 1)"),
    ],
  )
  def test_line_that_is_not_json_is_refused(self, line, problem):
    message = refusal(lines(POSITION) + line)
    assert message[0] == "1 problems with prompts:"
    assert message[1].startswith(f"file:2: the line must be JSON: {problem}")

  @pytest.mark.parametrize(
    "value", ["1e308", "1" * 300, '"\\ud800"', "[" * 40 + "]" * 40]
  )
  def test_odd_value_that_is_not_read_is_ignored(self, value):
    line = json.dumps(COUNTING).replace("{", f'{{"more": {value}, ')
    assert records_lib.parse(line.encode(), "file")[0].to_json() == COUNTING

  @pytest.mark.parametrize(
    "value", ["1e308", "1" * 300, '"\\udfff"', "[" * 40 + "]" * 40, "{}"]
  )
  def test_odd_value_of_a_field_is_refused(self, value):
    line = json.dumps(POSITION).replace(
      '"a photo of a dog right of a bear"', value
    )
    message = refusal(line.encode())
    assert message[0] == "1 problems with prompts:" and message[1].startswith(
      "file:1: prompt must"
    )

  def test_byte_order_mark_line_ends_and_separators_in_texts_are_read(self):
    strange = COUNTING | {"prompt": "two\u2028cats\u0085 and\x1c"}
    text = (
      json.dumps(POSITION)
      + "\r\n\r\n"
      + json.dumps(strange, ensure_ascii=False)
    )
    records = records_lib.parse(b"\xef\xbb\xbf" + text.encode(), "file")
    assert [record.text for record in records] == [
      POSITION["prompt"],
      strange["prompt"],
    ]
    assert refusal(b"\xef\xbb\xbf\n[]")[1].startswith("file:2: ")

  def test_prompt_that_repeats_with_other_items_is_refused(self):
    other = POSITION | {"include": POSITION["include"][:1]}
    assert refusal(lines(COUNTING, POSITION, other)) == [
      "1 problems with prompts:",
      "file:3: prompt 'a photo of a dog right of a bear' repeats line 2",
    ]
    assert refusal(lines(POSITION, other))[1:] == [
      "file:2: prompt 'a photo of a dog right of a bear' repeats line 1"
    ]

  def test_tiif_records_may_share_a_prompt(self):
    other = TIIF | {"yn_answer_list": ["yes", "yes"]}
    longer = TIIF | {"long_description": "Another text."}
    assert len(records_lib.parse(lines(TIIF, other, longer), "file")) == 3

  def test_tiif_record_that_repeats_entirely_is_refused(self):
    other = TIIF | {"short_description": "A table."}
    assert refusal(lines(TIIF, other, TIIF))[1:] == [
      "file:3: record of prompt 'A table without a cup.' repeats line 1"
    ]

  def test_file_of_copies_is_read_as_it_is(self, monkeypatch):
    logged = []
    monkeypatch.setattr(
      logging, "info", lambda text, *values: logged.append(text % values)
    )
    records = records_lib.parse(
      lines(*[COUNTING, POSITION] * 2, POSITION, COUNTING), "file"
    )
    assert [record.tag for record in records] == [
      "counting",
      "position",
      "counting",
      "position",
      "position",
      "counting",
    ]
    assert logged == ["file holds each of its prompts 3 times"]

  def test_copies_of_some_records_only_are_refused(self):
    assert len(refusal(lines(*[COUNTING, POSITION] * 2, COUNTING))) == 1 + 3

  def test_copies_beside_other_problems_do_not_hide_them(self):
    assert refusal(lines(*[COUNTING] * 60, REGION, []))[1] == (
      "file:62: a record must be a JSON object, got list"
    )

  def test_empty_file_has_no_records(self):
    assert records_lib.parse(b"\n \n", "file") == []


TOKENS = [
  b"NaN",
  b"1e999",
  b"-",
  b"\\ud800",
  b"[" * 3000,
  b"]",
  b"{",
  b"}",
  b'"',
  b"9" * 5000,
  b"\n",
  b"\r",
  b"\xef\xbb\xbf",
  b"\xff",
  b"\0",
  b"null",
  b"true",
  b'"tag": "x", ',
  b"include",
  b"questions",
  b"0",
  b"-1",
  b'["above", 0]',
  b"\xe2\x80\xa8",
  b" ",
]


def mutate(content, rng):
  """Returns the content with one to four small damages."""
  for _ in range(rng.randint(1, 4)):
    at = rng.randrange(len(content) + 1)
    end = min(len(content), at + rng.randint(1, 12))
    new = rng.choice(
      [b"", rng.randbytes(1), rng.choice(TOKENS), content[at:end] * 2]
    )
    content = content[:at] + new + content[rng.choice([at, end]) :]
  return content


class TestFuzz:
  @pytest.mark.parametrize("seed", range(4))
  def test_damaged_file_gives_records_or_problems_with_line_numbers(self, seed):
    rng, outcomes = random.Random(seed), []
    valid = lines(
      POSITION, COUNTING, REGION, TIIF, QUESTIONS | {"prompt": "Another."}
    )
    for _ in range(200):
      content = mutate(valid, rng)
      try:
        records = records_lib.parse(content, "file")
      except ValueError as error:
        assert type(error) is ValueError
        head, *problems = str(error).splitlines()
        assert re.fullmatch(r"\d+ problems with prompts:", head)
        for problem in problems:
          assert re.match(r"file:\d+: ", problem), problem
        outcomes.append("refused")
      else:
        again = lines(*(record.to_json() for record in records))
        assert records_lib.parse(again, "again") == records
        outcomes.append("read")
    assert min(outcomes.count("refused"), outcomes.count("read")) >= 10

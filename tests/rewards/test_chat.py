"""Tests of rewards/remote/chat.py; tests/rewards/test_judge.py has its replies from a server."""

import pytest

from r3jax.rewards.remote import chat

KEYS = ("1", "2")


def read(text: str) -> dict:
  return chat.read_answers(text, KEYS, ("yes", "no"))


class TestReadAnswers:
  @pytest.mark.parametrize(
    "text",
    [
      '{"1": "yes", "2": "no"}',
      'Note {1, "2"} and {"2": "yes"}: {"2": "no", "1": "yes"}.',
      '{"1": "Yes", "2": "NO", "why": [{"1": "no"}]}',
      '<think> {"1": "no", "2": "no"} </think> {"1": "yes", "2": "no"}',
    ],
  )
  def test_object_with_all_keys_is_read(self, text):
    assert read(text) == {"1": "yes", "2": "no"}

  @pytest.mark.parametrize(
    "text, message",
    [
      ("yes", r"keys \['1', '2'\]; it holds no object"),
      ('{"1": "yes"}', r"it holds \['1'\]"),
      ('<think> {"1": "yes", "2": "no"}', "the thought has no end"),
      ('{"1": "yes", "2": 0}', "one of .*; got 0"),
      ('{"1": "yes", "2": "no", "2": "yes"}', "a key is there twice"),
      ('{"1": "yes", "2": "no"} {"1": "no", "2": "no"}', "contradict"),
      ('{"1": ' * 50_000, "nested too deep"),
      ('{"1": ' * 60 + "1" + "}" * 60, "at most 50 levels deep"),
      # Every brace would be searched from to the end of its part.
      ('{"a":' * 400 + "x " + '{"a":' * 400, "at most 500 JSON objects"),
      ("{}" * 501, "at most 500 JSON objects"),
      ("y" * 1_000_001, "at most 1000000 characters; it has 1000001"),
      ("{" * 50_000, "it holds no object"),
    ],
  )
  def test_anything_else_is_no_verdict(self, text, message):
    with pytest.raises(ValueError, match=message):
      read(text)

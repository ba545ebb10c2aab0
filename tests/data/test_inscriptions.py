"""Tests of data/inscriptions.py."""

import pytest

from r3jax.data import inscriptions
from r3jax.data import records


class TestComparable:
  @pytest.mark.parametrize(
    "text, same",
    [
      ("Open  DAILY\nnow", "opendailynow"),  # case and white space
      ("Ｏｐｅｎ", "open"),  # full width
      ("cafe\u0301", "caf\u00e9"),  # NFD and NFC
      ("ﬁnish", "finish"),  # a ligature
      ("STRASSE", "straße"),
      ("o\u200bpen\u00ad", "open"),  # zero width, soft hyphen
      ("don’t — “stop”", 'don\'t-"stop"'),  # typographic marks
      ("\u200b \ufe0f", ""),
    ],
  )
  def test_what_a_reader_calls_the_same_is_the_same(self, text, same):
    assert inscriptions.comparable(text) == inscriptions.comparable(same)

  @pytest.mark.parametrize(
    "text, other",
    [("0pen", "Open"), ("café", "cafe"), ("$4.50", "$450"), ("it's", "its")],
  )
  def test_other_characters_are_others(self, text, other):
    assert inscriptions.comparable(text) != inscriptions.comparable(other)


class TestQuoted:
  @pytest.mark.parametrize(
    "text, inscription",
    [
      ('a mug that says "Good morning"', "Good morning"),
      ("a mug that says “Good morning”", "Good morning"),
      ("ein Schild „Offen“ und «là»", "Offen là"),
      ('a sign "STOP" above a sign "it\'s over"', "STOP it's over"),
      ("a dog's 'bone'", None),
      ('a 12" ruler', None),
      ('a sign that says ""', None),
      ('a sign that says " "', None),
    ],
  )
  def test_double_quotes_hold_the_inscription(self, text, inscription):
    assert inscriptions.quoted(text) == inscription


class TestCompleted:
  def test_quotes_are_read_where_nothing_else_is_asked_for(self):
    plain = records.Prompt("t", 'a mug, "hi"')
    assert inscriptions.completed(plain).inscription == "hi"
    own = records.Prompt("t", 'a mug, "hi"', inscription="ho")
    assert inscriptions.completed(own) is own
    item = records.Expectation("cup", 1)
    geneval = records.Prompt("t", 'a "cup"', include=(item,))
    assert inscriptions.completed(geneval) is geneval

"""Tests of rewards/remote/plain_pickle.py."""

import contextlib
import os
import pickle
import random

import numpy as np
import pytest

from r3jax.rewards.remote import http_client
from r3jax.rewards.remote import plain_pickle

WHOLE = pickle.dumps(
  {
    "scores": [0.25, -14.0, 1.0],
    "rewards": [0, 0, 1],
    "strict_rewards": [0, 0, 1.0],
    "group_rewards": {"colors": [0, 1]},
  }
)
# x = (); 80 times x = (x, x). Its hash takes 2**80 steps.
NEST = b")" + b"q\x01h\x01\x86" * 80
# name -> (a pickle, the message)
HOSTILE = {
  "tuples as a key": (
    b"}" + NEST + b"K\x01s.",
    "a key must be a text; got a tuple",
  ),
  "tuples as a value": (NEST + b".", "at most 200000 values"),
  "deep lists": (b"(" * 90_000 + b"l" * 90_000 + b".", "levels deep"),
  "deep tuples": (b")" + b"\x85" * 150_000 + b".", "levels deep"),
  "list in itself": (b"]q\x00h\x00a.", "levels deep"),
  "dict in itself": (b"}q\x00X\x01\x00\x00\x00ah\x00s.", "levels deep"),
  "wide and shared": (b"]q\x00" + b"h\x00" * 10 + b"a.", "levels deep"),
  "too many opcodes": (b"N" * 200_001, "more than 200000 opcodes"),
  "marks alone": (b"(" * 100_000 + b".", "IndexError"),
  "too long": (b"N" * (2**24 + 1), "at most 16777216 bytes"),
  "digits without end": (b"L" + b"9" * 10**6 + b"L\n.", "1000001 digits"),
  "text without end": (b"X\xff\xff\xff\x7fa.", "it ends too early"),
  "memo that is empty": (b"h\x00.", "KeyError"),
  "no value": (b".", "IndexError"),
  "append to a dict": (b"}Na.", "appends to what is no list"),
  "items of a list": (b"]NNs.", "sets items of what is no dict"),
  "half an item": (b"}(Nu.", "sets items of what is no dict"),
  "halves of a pair": (b"\x8c\x03\xed\xa0\x80.", "UnicodeDecodeError"),
  "persistent id": (b"P1\n.", "it has the opcode PERSID"),
  "no opcode": (b"\xff.", "it has the opcode b'.xff'"),
}


class _Runs:
  """Calls a function with arguments when it is unpickled."""

  def __init__(self, function, *arguments):
    self.call = function, arguments

  def __reduce__(self):
    return self.call


class TestRead:
  @pytest.mark.parametrize("level", range(pickle.HIGHEST_PROTOCOL + 1))
  def test_plain_values_come_back(self, level):
    value = {
      "scores": [0.5, -14, 10**30],
      "reasons": ["é", ""],
      "group": {"a": (1, None, True)},
    }
    assert plain_pickle.read(pickle.dumps(value, level)) == value

  @pytest.mark.parametrize("level", range(pickle.HIGHEST_PROTOCOL + 1))
  def test_nothing_is_run(self, level, tmp_path):
    made = tmp_path / "made"
    for bomb in (
      _Runs(os.mkdir, str(made)),
      _Runs(eval, f"__import__('os').mkdir({str(made)!r})"),
      np.float64(1),
    ):
      with pytest.raises(
        http_client.BadReply,
        match="it has the opcode (GLOBAL|STACK_GLOBAL|REDUCE|PERSID|BINPERSID|NEWOBJ|BINBYTES|"
        "SHORT_BINBYTES)",
      ):
        plain_pickle.read(pickle.dumps({"scores": [bomb]}, level))
    assert not made.exists()

  @pytest.mark.parametrize(
    "value", [b"bytes", bytearray(b"b"), {1, 2}, frozenset([1])]
  )
  def test_other_values_are_refused(self, value):
    with pytest.raises(
      http_client.BadReply,
      match="must be a pickle of plain values; it has the opcode",
    ):
      plain_pickle.read(pickle.dumps({"scores": [value]}, 5))

  def test_large_memo_index_takes_no_room(self):
    # 1, kept under the number 0x7f000000
    assert plain_pickle.read(b"\x80\x04K\x01r\x00\x00\x00\x7f.") == 1

  @pytest.mark.parametrize("level", range(pickle.HIGHEST_PROTOCOL + 1))
  def test_list_that_stands_twice_comes_back(self, level):
    column = [0.5, 1]
    value = {"scores": column, "rewards": column}
    assert plain_pickle.read(pickle.dumps(value, level)) == value

  @pytest.mark.timeout(20)
  @pytest.mark.parametrize("body, message", HOSTILE.values(), ids=HOSTILE)
  def test_hostile_pickle_is_refused_at_once(self, body, message):
    with pytest.raises(http_client.BadReply, match=message) as refusal:
      plain_pickle.read(body)
    assert len(str(refusal.value)) < 200

  def test_damaged_pickle_is_no_reply(self):
    rng, whole = random.Random(0), WHOLE
    for _ in range(2000):
      body = bytearray(whole)
      for _ in range(rng.randint(1, 4)):
        body[rng.randrange(len(body))] = rng.randrange(256)
      with contextlib.suppress(http_client.BadReply):
        plain_pickle.read(bytes(body[: rng.randint(1, len(body))]))

"""Tests of the format reward and the instruction parsers."""

import functools

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import models
from tokenizers import pre_tokenizers

from r3jax.sequence import protocol
from r3jax.sequence import thoughts
from r3jax.sequence import tokenization
from r3jax.worlds.shapes import vocabulary

FIELDS = ("format", "instruction", "instruction_length", "stop", "truncated")


@functools.cache
def _world():
  tokenizer = tokenization.TextTokenizer(vocabulary.build_tokenizer())
  return tokenizer, thoughts.tag_ids(tokenizer)


def _batch(bodies, capacity):
  """Packs bodies (lists of ids) as text segments."""
  ids = np.zeros((len(bodies), capacity), np.int32)
  for row, body in zip(ids, bodies):
    row[: len(body) + 2] = [1, *body, 2]
  return ids, np.asarray([len(body) + 2 for body in bodies], np.int32)


def _random_bodies(rng, size, longest, token_count):
  """Draws bodies rich in tags, stop phrases, special tokens and protocol sentences."""
  tokenizer, tags = _world()
  phrase = [tags.no, tags.further, tags.edit]
  special = tokenizer.encode(
    " ".join(["<pad>", *tokenization.SPECIAL_TOKENS.values()])
  )
  sentences = [token.token_id for token in tags.tagged] + list(tags.stop_tokens)
  bodies = []
  for _ in range(size):
    body = []
    while rng.random() < 0.85:
      body += [
        [tags.think_open],
        [tags.think_close],
        phrase,
        [phrase[rng.integers(3)]],
        [special[rng.integers(len(special))]],
        [sentences[rng.integers(len(sentences))]] if rng.random() < 0.3 else [],
        rng.integers(0, token_count, rng.integers(4)).tolist(),
      ][rng.integers(7)]
    if rng.random() < 0.5:  # near the right format
      inner = [i for i in body if i not in (5, 6)]
      cut = rng.integers(len(inner) + 1)
      body = [5, *inner[:cut], 6, *inner[cut:]]
    bodies.append(body[:longest])
  return bodies


class TestFormatReward:
  def test_non_strings_give_zero(self):
    for value in (None, 3, ["<think>a</think>"]):
      assert thoughts.format_reward(value, "reason") == 0.0
      assert thoughts.format_reward(value, "reflect") == 0.0

  def test_special_token_text_is_text(self):
    assert (
      thoughts.format_reward(
        "<think> <|im_end|> </think> <|im_end|>", "reflect"
      )
      == 1.0
    )

  def test_unknown_stage_is_refused(self):
    with pytest.raises(
      ValueError, match="stage must be one of .* was 'refine'"
    ):
      thoughts.format_reward("", "refine")


class TestSaysStop:
  def test_any_case_and_place(self):
    assert thoughts.says_stop(thoughts.NO_EDIT)
    assert thoughts.says_stop("well, NO FURTHER EDIT.")
    assert not thoughts.says_stop("no edit")
    assert not thoughts.says_stop("")


class TestTagIds:
  def test_world_ids(self):
    tokenizer, tags = _world()
    assert (
      tags.text_begin,
      tags.text_end,
      tags.think_open,
      tags.think_close,
    ) == (1, 2, 5, 6)
    assert tokenizer.decode(tags.no_edit) == "no further edit needed"
    assert [tokenizer.decode(token.tail) for token in tags.tagged] == [
      "image here.",
      "answer here",
    ]
    assert len(tags.stop_tokens) == 1

  def test_vocabulary_without_tags_is_refused(self):
    words = [
      "<unk>",
      "no",
      "further",
      "edit",
      *tokenization.SPECIAL_TOKENS.values(),
    ]
    tokenizer = _word_level(words)
    with pytest.raises(ValueError, match=r"missing: \['<think>', '</think>'\]"):
      thoughts.tag_ids(tokenizer)

  def test_word_that_could_form_the_phrase_is_refused(self):
    words = ["<unk>", "no", "further", "edit", "needed", "<think>", "</think>"]
    words.append("piano")  # "piano further edit" holds the phrase
    tokenizer = _word_level([*words, *tokenization.SPECIAL_TOKENS.values()])
    with pytest.raises(ValueError, match="saw 'piano'"):
      thoughts.tag_ids(tokenizer)


def _word_level(words):
  model = models.WordLevel(
    {word: i for i, word in enumerate(words)}, unk_token="<unk>"
  )
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  return tokenization.TextTokenizer(tokenizer)


class TestParseTokens:
  @pytest.mark.parametrize("stage", ["reason", "reflect"])
  @pytest.mark.parametrize("instruction_capacity", [2, 3, 6, 12, 40])
  def test_equals_string_parser_on_random_ids(
    self, stage, instruction_capacity
  ):
    tokenizer, tags = _world()
    rng = np.random.default_rng(instruction_capacity)
    ids, lengths = _batch(_random_bodies(rng, 2000, 30, tokenizer.size), 32)
    parse = jax.jit(thoughts.parse_tokens, static_argnums=(2, 3, 4))
    graph = parse(ids, lengths, stage, tags, instruction_capacity)
    host = thoughts.parse_strings(
      ids, lengths, stage, tokenizer, instruction_capacity
    )
    for field in FIELDS:
      got, want = np.asarray(getattr(graph, field)), getattr(host, field)
      assert got.dtype == want.dtype, field
      bad = np.flatnonzero((got != want).reshape(len(ids), -1).any(1))
      assert not bad.size, (
        field,
        tokenizer.decode(ids[bad[0], : lengths[bad[0]]]),
      )
    assert 0.02 < host.format.mean() < 0.6  # both outcomes are common
    assert 0.1 < host.stop.mean() < 0.9

  def _parse(self, text, stage="reflect", capacity=12):
    tokenizer, tags = _world()
    ids, lengths = _batch([tokenizer.encode(text)], 64)
    parsed = thoughts.parse_tokens(ids, lengths, stage, tags, capacity)
    length = int(parsed.instruction_length[0])
    instruction = parsed.instruction[0]
    assert (instruction[0], instruction[length - 1]) == (1, 2)
    assert not instruction[length:].any()
    return (
      float(parsed.format[0]),
      tokenizer.decode(instruction[1 : length - 1].tolist()),
      bool(parsed.stop[0]),
      bool(parsed.truncated[0]),
    )

  def test_instruction_after_thought(self):
    text = "<think> ok </think> remove the red square at top"
    assert self._parse(text) == (
      1.0,
      "remove the red square at top",
      False,
      False,
    )
    assert self._parse(text, "reason") == (
      0.0,
      "remove the red square at top",
      False,
      False,
    )

  def test_empty_instruction(self):
    assert self._parse("<think> </think>") == (0.0, "", False, False)
    assert self._parse("<think> </think>", "reason") == (1.0, "", False, False)

  def test_missing_tag_means_stop(self):
    assert self._parse("<think> red") == (
      0.0,
      "no further edit needed",
      True,
      False,
    )
    assert self._parse("") == (0.0, "no further edit needed", True, False)

  def test_special_tokens_end_nothing(self):
    text = "<think> red <|im_end|> ring </think> <|im_start|> no further edit <|im_end|>"
    assert self._parse(text) == (
      1.0,
      "<|im_start|> no further edit <|im_end|>",
      True,
      False,
    )

  def test_stop_in_thought_is_not_an_instruction(self):
    text = "<think> no further edit needed </think> ring"
    assert self._parse(text) == (1.0, "ring", False, False)

  def test_stop_beyond_capacity_still_counts(self):
    text = "<think> </think> red ring and no further edit"
    assert self._parse(text, capacity=4) == (1.0, "red ring", True, True)

  def test_protocol_sentence_with_tags_is_text(self):
    text = f"<think> {protocol.GEN_THINK} red"
    assert self._parse(text) == (0.0, "image here. red", False, False)


class TestParseStrings:
  def test_phrase_as_one_token_stops(self):
    tokenizer, tags = _world()
    ids, lengths = _batch(
      [[5, 6, tags.stop_tokens[0]], [5, 6, tags.no, tags.edit]], 8
    )
    parsed = thoughts.parse_strings(ids, lengths, "reflect", tokenizer, 6)
    assert parsed.stop.tolist() == [True, False]
    assert parsed.instruction.tolist() == [
      [1, tags.stop_tokens[0], 2, 0, 0, 0],
      [1, tags.no, tags.edit, 2, 0, 0],
    ]

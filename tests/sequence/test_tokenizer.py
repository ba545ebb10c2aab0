"""Tests of the tokenizer wrapper."""

import json

import pytest
from tokenizers import pre_tokenizers

from r3jax.sequence import protocol
from r3jax.sequence import tokenization
from r3jax.worlds.shapes import vocabulary

MERGES = [("1", "2"), ("h", "e"), ("Ġ", "he"), ("he", "he")]


@pytest.fixture(scope="module")
def world():
  return tokenization.TextTokenizer(vocabulary.build_tokenizer())


@pytest.fixture(scope="module")
def bpe_folder(tmp_path_factory):
  """A folder with slow files: all bytes, four merges, the four markers."""
  folder = tmp_path_factory.mktemp("bpe")
  tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) + [
    "".join(pair) for pair in MERGES
  ]
  (folder / "vocab.json").write_text(
    json.dumps({token: i for i, token in enumerate(tokens)})
  )
  merges = "\n".join(" ".join(pair) for pair in MERGES)
  (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
  added = {
    str(260 + i): {"content": token, "special": True}
    for i, token in enumerate(tokenization.SPECIAL_TOKENS.values())
  }
  (folder / "tokenizer_config.json").write_text(
    json.dumps({"added_tokens_decoder": added})
  )
  return folder


class TestLoad:
  def test_tokenizer_json(self, tmp_path, world):
    vocabulary.build_tokenizer().save(str(tmp_path / "tokenizer.json"))
    loaded = tokenization.load(tmp_path)
    text = protocol.reflection_question("a photo of two rings")
    assert loaded.encode(text) == world.encode(text)
    assert loaded.decode(loaded.encode(text)) == text
    assert loaded.vocabulary == world.vocabulary

  def test_byte_level_files(self, bpe_folder):
    tokenizer = tokenization.load(bpe_folder)
    assert tokenizer.size == 264
    for text in (
      "hehe  the\n\n12 é漢字 don't",
      "<|im_end|> x<|im_start|>",
      " a \n b",
    ):
      assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = tokenizer.vocabulary
    assert tokenizer.encode("hehe he") == [ids["hehe"], ids["Ġhe"]]
    # digits are split before any merge
    assert tokenizer.encode("12") == [ids["1"], ids["2"]]
    assert tokenizer.encode("<|im_end|>") == [261]

  def test_empty_folder_is_refused(self, tmp_path):
    with pytest.raises(
      ValueError, match="tokenizer.json, or vocab.json and merges.txt"
    ):
      tokenization.load(tmp_path)


class TestSpecialIds:
  def test_found_by_content(self, world, bpe_folder):
    ids = tokenization.load(bpe_folder).special_ids
    assert (ids.text_begin, ids.text_end, ids.image_begin, ids.image_end) == (
      260,
      261,
      262,
      263,
    )
    assert world.special_ids.image_end == 4

  def test_missing_ones_are_named(self, bpe_folder, tmp_path):
    for name in ("vocab.json", "merges.txt"):
      (tmp_path / name).write_text((bpe_folder / name).read_text())
    with pytest.raises(
      ValueError, match=r"missing: \['<\|im_start\|>', '<\|im_end\|>'"
    ):
      _ = tokenization.load(tmp_path).special_ids


class TestEncode:
  def test_unknown_words_are_named(self, world):
    with pytest.raises(ValueError, match=r"unknown \['giraffe', 'oboe'\]"):
      world.encode("a photo of a giraffe and a oboe")

  def test_unknown_token_itself_is_text(self, world):
    assert world.decode(world.encode("<unk> ring")) == "<unk> ring"

  def test_case_is_folded(self, world):
    assert world.encode("A Photo of a RING") == world.encode(
      "a photo of a ring"
    )

  def test_protocol_sentences_cost_one_token(self, world):
    assert len(world.encode(protocol.GEN_THINK)) == 1
    assert len(world.encode(protocol.VLM_THINK)) == 1
    assert (
      len(world.encode(protocol.reflection_question("a photo of a ring")))
      == 2 + 5
    )


class TestDecode:
  def test_special_tokens_stay(self, world):
    assert (
      world.decode([1, 5, 2, 6]) == "<|im_start|> <think> <|im_end|> </think>"
    )

  def test_protocol_text_is_exact(self, world):
    for text in (
      protocol.GEN_THINK,
      protocol.VLM_THINK,
      protocol.reflection_question("a ring"),
    ):
      assert world.decode(world.encode(text)) == text


class TestSegment:
  def test_markers_and_padding(self, world):
    ids, length = world.segment("<think> </think>", 6)
    assert ids.tolist() == [1, 5, 6, 2, 0, 0]
    assert ids.dtype.name == "int32"
    assert length == 4

  def test_exact_fit(self, world):
    assert world.segment("<think> </think>", 4)[1] == 4

  def test_overflow_names_numbers_and_text(self, world):
    with pytest.raises(
      ValueError, match=r"5 tokens .* capacity 4: 'a red ring'"
    ):
      world.segment("a red ring", 4)

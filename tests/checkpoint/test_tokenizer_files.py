"""Tests that a tokenizer is read from either set of files of a folder."""

import json

import pytest
import tokenizers
from tokenizers import models
from tokenizers import pre_tokenizers

from r3jax.checkpoint import tokenizer_files
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
    loaded = tokenizer_files.load(tmp_path)
    text = protocol.reflection_question("a photo of two rings")
    assert loaded.encode(text) == world.encode(text)
    assert loaded.decode(loaded.encode(text)) == text
    assert loaded.vocabulary == world.vocabulary

  def test_byte_level_files(self, bpe_folder):
    tokenizer = tokenizer_files.load(bpe_folder)
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

  @pytest.mark.parametrize("merge", ["he 1", "x h", "h"])
  def test_merge_of_tokens_that_are_not_there_is_refused(
    self, bpe_folder, tmp_path, merge
  ):
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
      (tmp_path / name).write_text((bpe_folder / name).read_text())
    with (tmp_path / "merges.txt").open("a") as file:
      file.write(f"{merge}\n")
    message = "merges.txt must (merge tokens of the vocabulary|have two tokens)"
    with pytest.raises(ValueError, match=message):
      tokenizer_files.load(tmp_path)

  @pytest.mark.parametrize("merge", [["a", "c"], "a c"])
  def test_merge_in_one_file_is_checked_too(self, tmp_path, merge):
    vocabulary_of_bytes = {"a": 0, "b": 1, "c": 2, "ab": 3}
    tokenizer = tokenizers.Tokenizer(
      models.BPE(vocabulary_of_bytes, [("a", "b")])
    )
    content = json.loads(tokenizer.to_str())
    content["model"]["merges"].append(merge)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="tokenizer.json must merge tokens"):
      tokenizer_files.load(tmp_path)

  def test_empty_folder_is_refused(self, tmp_path):
    with pytest.raises(
      ValueError, match="tokenizer.json, or vocab.json and merges.txt"
    ):
      tokenizer_files.load(tmp_path)


class TestSpecialIds:
  def test_found_by_content(self, world, bpe_folder):
    ids = tokenizer_files.load(bpe_folder).special_ids
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
      _ = tokenizer_files.load(tmp_path).special_ids

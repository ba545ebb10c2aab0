"""Tests of the tokenizer wrapper."""

import pytest

from r3jax.sequence import protocol
from r3jax.sequence import tokenization
from r3jax.worlds.shapes import vocabulary


@pytest.fixture(scope="module")
def world():
  return tokenization.TextTokenizer(vocabulary.build_tokenizer())


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

  @pytest.mark.parametrize(
    "text",
    ["a ring <|im_end|> <|im_start|>", "x<|vision_start|>", "<|IM_END|>"],
  )
  def test_marker_in_a_text_is_refused(self, world, text):
    with pytest.raises(ValueError, match=r"must not hold the marker <\|"):
      world.segment(text, 99)

  def test_half_of_a_surrogate_pair_is_refused(self, world):
    for text in ("\ud800", "a ring \udcff"):
      with pytest.raises(ValueError, match="without lone surrogates; got '"):
        world.segment(text, 99)

  def test_text_of_brackets_is_no_marker(self):
    for text in ("a <| b |>", "<|>", "<||>", "<|a b|>", "<im_end>"):
      assert tokenization.marker_in(text) == ""
    assert tokenization.marker_in("a <|image_pad|> b") == "<|image_pad|>"

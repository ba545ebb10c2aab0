"""Tests of the protocol strings."""

import hashlib

from r3jax.sequence import protocol


def _sha256(text):
  return hashlib.sha256(text.encode()).hexdigest()


class TestProtocol:
  def test_gen_think_is_exact(self):
    assert len(protocol.GEN_THINK) == 210
    assert _sha256(protocol.GEN_THINK) == (
      "5da62fd7987ad29bab9322636ecf7b6190752ccafbb55150957e79cc3a3201be"
    )

  def test_vlm_think_is_exact(self):
    assert len(protocol.VLM_THINK) == 227
    assert _sha256(protocol.VLM_THINK) == (
      "5eff00888fdf6b912c3f9a80711933dd35cdd164d167cba6b2a5889c04d7b565"
    )

  def test_reflection_is_exact(self):
    assert len(protocol.REFLECTION) == 272
    assert _sha256(protocol.REFLECTION) == (
      "2a0a6694e61773328dd98591de34b17b2e6b58c23cebf78a7f0382ae3f32d17d"
    )

  def test_space_stands_before_the_newline(self):
    assert protocol.GEN_THINK.count(". \n") == 1
    assert protocol.VLM_THINK.count(". \n") == 1


class TestReflectionQuestion:
  def test_prompt_stands_between_the_parts(self):
    question = protocol.reflection_question("a photo of a ring")
    assert question.startswith(
      "The description of the target image is: a photo of a ring\nHow to"
    )
    assert question.endswith("answer: no further edit needed.")

  def test_braces_in_a_prompt_are_text(self):
    assert "is: a {prompt} {0} b\n" in protocol.reflection_question(
      "a {prompt} {0} b"
    )

"""Tests of data/generators/ocr.py."""

import collections

import pytest

from r3jax.data import contamination
from r3jax.data import inscriptions
from r3jax.data import records
from r3jax.data.generators import ocr


@pytest.fixture(scope="module")
def prompts():
  return ocr.generate(2000, seed=0)


class TestGenerate:
  def test_tags_take_turns(self, prompts):
    counts = collections.Counter(prompt.tag for prompt in prompts)
    assert counts == dict.fromkeys(ocr.TAGS, 500)

  def test_prompts_are_different_and_valid(self, prompts):
    assert len({prompt.text for prompt in prompts}) == 2000
    for prompt in prompts:
      assert records.Prompt.from_json(prompt.to_json()) == prompt

  def test_inscription_is_what_the_prompt_quotes(self, prompts):
    for prompt in prompts:
      assert inscriptions.quoted(prompt.text) == prompt.inscription

  def test_seed_decides_and_shorter_is_a_part(self, prompts):
    assert ocr.generate(100, seed=0) == prompts[:100]
    assert ocr.generate(100, seed=1) != prompts[:100]
    with pytest.raises(ValueError, match="the seed -1 is that of the test set"):
      ocr.generate(100, seed=-1)

  def test_wording(self):
    scene = ("a cup",)
    title, lower = (str.title,), (str.lower,)
    built = [
      ocr._word(("exit",), title, scene),
      ocr._words(("wild",), ("fox",), lower, scene),
      ocr._sentence(("find",), ("wild",), ("fox",), (str.capitalize,), scene),
      ocr._place(("gate",), (17,), scene),
      ocr._price((4,), (5,), scene),
      ocr._time((7,), (30,), ("PM",), scene),
    ]
    assert [prompt.inscription for prompt in built] == [
      "Exit",
      "wild fox",
      "Find the wild fox",
      "Gate 17",
      "$4.05",
      "7:30 PM",
    ]
    assert built[0].text == 'a photo of a cup that says "Exit"'


class TestHeldout:
  def test_is_balanced_and_fixed(self):
    heldout = ocr.heldout()
    assert heldout == ocr.heldout()
    counts = collections.Counter(prompt.tag for prompt in heldout)
    assert counts == dict.fromkeys(ocr.TAGS, 50)

  def test_no_inscription_is_left_to_train_on(self, prompts):
    heldout = ocr.heldout()
    remaining, overlap = contamination.clean(prompts, heldout)
    texts = {inscriptions.comparable(p.inscription) for p in heldout}
    assert not [
      prompt
      for prompt in remaining
      if inscriptions.comparable(prompt.inscription) in texts
    ]
    assert overlap.tags["word"].include > 100
    assert not overlap.vanished

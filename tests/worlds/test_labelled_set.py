"""Tests of worlds/shapes/labelled_set.py, and of the set that is shipped."""

import collections

import jax
import numpy as np
import pytest

from r3jax.worlds.shapes import grammar
from r3jax.worlds.shapes import labelled_set
from r3jax.worlds.shapes import prompts
from r3jax.worlds.shapes import readings
from r3jax.worlds.shapes import verifier


@pytest.fixture(name="shipped", scope="module")
def fixture_shipped():
  return labelled_set.load()


@pytest.fixture(name="strict", scope="module")
def fixture_strict(shipped):
  """What the verifier says of the shipped images."""
  by_text = {record.text: record for record in prompts.heldout_records()}
  targets = verifier.encode_records([by_text[x.prompt] for x in shipped])
  pixels = np.stack([image.pixels for image in shipped])
  score = jax.jit(verifier.verify)(pixels, targets)
  return np.asarray(score.parts["strict"]) == 1


class TestShipped:
  def test_half_is_right_within_every_tag_and_origin(self, shipped):
    counts = collections.Counter(
      (image.tag, image.name.partition("_")[2], image.matches)
      for image in shipped
    )
    for tag in prompts.TAGS:
      of_tag = {key: n for key, n in counts.items() if key[0] == tag}
      assert sum(of_tag.values()) >= 100
      for origin in ("rendered", "draft"):
        assert counts[tag, origin, True] == counts[tag, origin, False] > 0

  def test_labels_are_what_the_verifier_says(self, shipped, strict):
    assert [image.matches for image in shipped] == strict.tolist()

  def test_prompts_are_held_out(self, shipped):
    heldout = {record.text for record in prompts.heldout_records()}
    assert {image.prompt for image in shipped} <= heldout

  def test_right_answers_of_every_kind_are_balanced(self, shipped):
    by_kind = collections.defaultdict(collections.Counter)
    for image in shipped:
      for question in image.questions:
        by_kind[question.kind][question.answer] += 1
    assert set(by_kind) == {"existence", "count", "color", "relation"}
    for answers in by_kind.values():
      assert answers.total() >= 100
      assert min(answers.values()) >= 0.5 * max(answers.values())
    assert set(by_kind["count"]) == {"zero", "one", "two", "three", "four"}
    assert by_kind["existence"]["yes"] == by_kind["existence"]["no"]

  def test_it_takes_less_than_a_megabyte(self):
    sizes = [path.stat().st_size for path in labelled_set.folder().iterdir()]
    assert sum(sizes) < 1_000_000


class TestMake:
  def test_equal_seeds_make_equal_sets_of_which_the_file_loses_nothing(
    self, shipped, strict, tmp_path, monkeypatch
  ):
    monkeypatch.setattr(labelled_set, "NUM_RENDERED", 3)
    monkeypatch.setattr(labelled_set, "NUM_DRAFTS", 2)
    monkeypatch.setattr(labelled_set, "_LEAST", 2)
    by_text = {record.text: record for record in prompts.heldout_records()}
    drafts = [
      labelled_set.Candidate(by_text[x.prompt], x.pixels, bool(is_right))
      for x, is_right in zip(shipped, strict, strict=True)
    ]
    images = labelled_set.make(drafts, seed=5)
    labelled_set.write(images, tmp_path / "set")
    again = labelled_set.read(tmp_path / "set")
    assert [x.labels() for x in again] == [x.labels() for x in images]
    repeated = labelled_set.make(drafts, seed=5)
    for first, second, third in zip(images, repeated, again, strict=True):
      np.testing.assert_array_equal(first.pixels, second.pixels)
      np.testing.assert_array_equal(first.pixels, third.pixels)
    assert len(images) == 6 * (2 * 3 + 2 * 2)

  def test_too_few_drafts_are_named(self):
    with pytest.raises(ValueError, match="20 right drafts of single_object"):
      labelled_set.make([], seed=0)


def test_answers_are_those_of_the_objects(shipped):
  images = [image for image in shipped if image.questions][:40]
  objects = readings.objects(np.stack([image.pixels for image in images]))
  for image, seen in zip(images, objects, strict=True):
    for question in image.questions:
      if question.kind == "count":
        # "how many hearts are there ?"
        plural = question.text.split()[2]
        shapes = list(prompts.PLURALS.values())
        count = sum(item.shape == shapes.index(plural) for item in seen)
        assert question.answer == grammar.NUMBERS[count]

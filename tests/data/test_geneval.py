"""Tests of data/generators/geneval.py."""

import collections

import pytest

from r3jax.data import benchmarks
from r3jax.data import records as records_lib
from r3jax.data.generators import geneval


@pytest.fixture(scope="module")
def records():
  """A list that exhausts single_object, counting and colors."""
  return to_json(geneval.generate(6000, seed=0))


def to_json(prompts):
  return [prompt.to_json() for prompt in prompts]


def of(records, tag):
  return [record for record in records if record["tag"] == tag]


class TestGenerate:
  def test_tags_take_turns_until_they_are_exhausted(self, records):
    counts = collections.Counter(record["tag"] for record in records)
    assert counts == {
      "single_object": 80,
      "counting": 240,
      "colors": 790,
      "two_object": 1630,
      "position": 1630,
      "color_attr": 1630,
    }
    assert tuple(counts) == benchmarks.BENCHMARKS["geneval"].tags

  def test_prompts_are_different_and_valid(self, records):
    assert len({record["prompt"] for record in records}) == 6000
    for record in records:
      assert (
        records_lib.Prompt.from_json(record, "generated").to_json() == record
      )

  def test_first_of_a_longer_list_are_a_shorter_list(self, records):
    assert to_json(geneval.generate(700, seed=0)) == records[:700]
    assert to_json(geneval.generate(700, seed=1)) != records[:700]

  def test_wording_of_every_tag(self, records):
    by_prompt = {record["prompt"]: record for record in records}
    assert by_prompt["a photo of an elephant"] == {
      "tag": "single_object",
      "prompt": "a photo of an elephant",
      "include": [{"class": "elephant", "count": 1}],
    }
    assert by_prompt["a photo of two clocks"] == {
      "tag": "counting",
      "prompt": "a photo of two clocks",
      "include": [{"class": "clock", "count": 2}],
      "exclude": [{"class": "clock", "count": 3}],
    }
    assert by_prompt["a photo of an orange tv remote"]["include"] == [
      {"class": "tv remote", "count": 1, "color": "orange"}
    ]

  def test_relation_is_of_the_second_item_to_the_first(self, records):
    for record in of(records, "position"):
      base, other = record["include"]
      relation, index = other["position"]
      assert (
        index == 0 and "position" not in base and relation in geneval.RELATIONS
      )
      words = (
        record["prompt"].removeprefix("a photo of ").split(f" {relation} ")
      )
      phrases = [
        geneval.with_article(records_lib.Expectation.from_json(item))
        for item in (other, base)
      ]
      assert words == phrases

  def test_persons_have_no_colour_and_items_differ(self, records):
    for record in records:
      items = record["include"]
      assert not any(
        "color" in item and item["class"] == "person" for item in items
      )
      for field in ("class", "color"):
        values = [item[field] for item in items if field in item]
        assert len(set(values)) == len(values)

  def test_everything_is_about_as_frequent(self, records):
    attributes = of(records, "color_attr")
    colors = collections.Counter(
      item["color"] for record in attributes for item in record["include"]
    )
    relations = collections.Counter(
      record["include"][1]["position"][0] for record in of(records, "position")
    )
    assert set(colors) == set(geneval.COLORS) and max(
      colors.values()
    ) < 1.3 * min(colors.values())
    assert len(relations) == 4 and max(relations.values()) < 1.3 * min(
      relations.values()
    )

  def test_more_than_there_are_is_refused(self):
    with pytest.raises(
      ValueError, match="at most the 587290 prompts that exist, got 587291"
    ):
      geneval.generate(587_291, seed=0)


class TestPlural:
  @pytest.mark.parametrize(
    "name, several",
    [
      ("bench", "benches"),
      ("bus", "buses"),
      ("toothbrush", "toothbrushes"),
      ("vase", "vases"),
      ("wine glass", "wine glasses"),
      ("knife", "knives"),
      ("giraffe", "giraffes"),
      ("sheep", "sheep"),
      ("person", "people"),
      ("skis", "skis"),
      ("teddy bear", "teddy bears"),
    ],
  )
  def test_plural_is_english(self, name, several):
    assert name in geneval.CLASSES
    assert geneval.plural(name) == several


class TestClasses:
  def test_there_are_eighty(self):
    assert len(set(geneval.CLASSES)) == 80
    assert len(geneval.COLORED) == 79

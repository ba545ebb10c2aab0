"""Tests of data/generators/geneval_plus.py."""

import collections

import pytest

from r3jax.data import benchmarks
from r3jax.data import records as records_lib
from r3jax.data.generators import geneval_plus


@pytest.fixture(scope="module")
def records():
  return to_json(geneval_plus.generate(3500, seed=0))


def to_json(prompts):
  return [prompt.to_json() for prompt in prompts]


def of(records, tag):
  return [record for record in records if record["tag"] == tag]


class TestGenerate:
  def test_tags_take_turns_until_they_are_exhausted(self, records):
    counts = collections.Counter(record["tag"] for record in records)
    assert tuple(counts) == benchmarks.BENCHMARKS["geneval_plus"].tags
    assert counts.pop("counting") == 320
    assert set(counts.values()) == {530}

  def test_prompts_are_different_and_valid(self, records):
    assert len({record["prompt"] for record in records}) == 3500
    for record in records:
      assert (
        records_lib.Prompt.from_json(record, "generated").to_json() == record
      )

  def test_first_of_a_longer_list_are_a_shorter_list(self, records):
    assert to_json(geneval_plus.generate(100, seed=0)) == records[:100]
    assert to_json(geneval_plus.generate(100, seed=1)) != records[:100]

  def test_numbers(self, records):
    def counts(tag):
      return {
        item["count"]
        for record in of(records, tag)
        for item in record["include"]
      }

    assert counts("counting") == {4, 5, 6, 7}
    for tag in (
      "spatial_count_attr",
      "color_count_attr",
      "multi_object_count_attr",
    ):
      assert counts(tag) == {1, 2, 3}
    for tag in ("color_attr", "color_spatial_attr", "size_spatial_attr"):
      assert counts(tag) == {1}

  def test_number_of_objects(self, records):
    sizes = {
      tag: collections.Counter(
        len(record["include"]) for record in of(records, tag)
      )
      for tag in ("color_attr", "multi_object_count_attr", "spatial_count_attr")
    }
    assert sizes == {
      "color_attr": {3: 265, 4: 265},
      "multi_object_count_attr": {2: 265, 3: 265},
      "spatial_count_attr": {2: 530},
    }

  def test_regions_are_opposite_and_the_first_object_is_the_larger(
    self, records
  ):
    placed = [
      record["include"]
      for record in records
      if "region" in record["include"][0]
    ]
    assert {tuple(item["region"] for item in items) for items in placed} == {
      ("left", "right"),
      ("above", "below"),
    }
    assert len(placed) == 3 * 530
    for record in of(records, "size_spatial_attr"):
      assert [item["size"] for item in record["include"]] == [
        "larger",
        "smaller",
      ]

  def test_counting_excludes_one_more(self, records):
    for record in of(records, "counting"):
      (item,) = record["include"]
      assert record["exclude"] == [item | {"count": item["count"] + 1}]

  def test_more_than_there_are_is_refused(self):
    with pytest.raises(
      ValueError, match="at most the 182103736140 prompts that exist"
    ):
      geneval_plus.generate(10**12, seed=0)

  @pytest.mark.parametrize(
    "tag, include, prompt",
    [
      (
        "color_attr",
        [("bus", 1, "brown"), ("oven", 1, "green"), ("cup", 1, "orange")],
        "A photo of a brown bus, a green oven, and an orange cup",
      ),
      (
        "color_count_attr",
        [("boat", 3, "white"), ("bench", 1, "green")],
        "A photo of three white boats and one green bench",
      ),
      (
        "multi_object_count_attr",
        [("knife", 2, None), ("sheep", 3, None), ("bus", 1, None)],
        "A photo of two knives, three sheep, and one bus",
      ),
    ],
  )
  def test_wording(self, tag, include, prompt):
    names, counts, colors = zip(*include)
    build = geneval_plus._TAGS[tag][0].build
    arguments = {
      "color_attr": (names, colors),
      "color_count_attr": (names, colors, (counts,)),
      "multi_object_count_attr": (names, (counts,)),
    }
    assert build(*arguments[tag]).text == prompt

  @pytest.mark.parametrize(
    "tag, choices, prompt",
    [
      (
        "spatial_count_attr",
        [((1, 2),)],
        "A photo of one cat on the above and two benches on the below",
      ),
      (
        "color_spatial_attr",
        [("red", "blue")],
        "A photo of red cat on the above and blue bench on the below",
      ),
      (
        "size_spatial_attr",
        [],
        "A photo of a larger cat on the above and a smaller bench on the below",
      ),
    ],
  )
  def test_wording_of_places(self, tag, choices, prompt):
    build = geneval_plus._TAGS[tag][0].build
    assert (
      build(("cat", "bench"), *choices, (("above", "below"),)).text == prompt
    )

"""Tests r3jax.worlds.prompts."""

import collections

import numpy as np
import pytest

from r3jax.worlds.shapes import prompts
from r3jax.worlds.shapes import scenes
from tests.worlds import cases

ALL = prompts.train_records() + prompts.heldout_records()


def _combination(record):
  """Returns what a record asks for, independently of the module: order and wording do not count."""
  items = [(item.class_name, item.color, item.count) for item in record.include]
  if record.tag != "position":
    return record.tag, frozenset(items)
  relation = record.include[1].position[0]
  second, first = (item[0] for item in items)  # "{first} {relation} {second}"
  if relation in ("right of", "below"):
    first, second = second, first
  return "position", relation in ("left of", "right of"), first, second


class TestRecords:
  def test_splits_have_the_expected_sizes(self):
    def count(records):
      return dict(collections.Counter(record.tag for record in records))

    assert count(prompts.train_records()) == {
      "single_object": 4,
      "two_object": 20,
      "counting": 12,
      "colors": 24,
      "position": 80,
      "color_attr": 600,
    }
    assert count(prompts.heldout_records()) == {
      "single_object": 2,
      "two_object": 10,
      "counting": 6,
      "colors": 12,
      "position": 40,
      "color_attr": 300,
    }

  @pytest.mark.parametrize("tag", prompts.TAGS)
  def test_splits_share_no_combination_in_tag(self, tag):
    train, heldout = (
      {_combination(record) for record in records if record.tag == tag}
      for records in (prompts.train_records(), prompts.heldout_records())
    )
    assert train and heldout and not train & heldout

  @pytest.mark.parametrize(
    "tag", ("two_object", "counting", "colors", "position", "color_attr")
  )
  def test_both_splits_use_every_class_and_color_in_tag(self, tag):
    for records in (prompts.train_records(), prompts.heldout_records()):
      items = [
        item
        for record in records
        if record.tag == tag
        for item in record.include
      ]
      assert {item.class_name for item in items} == set(scenes.SHAPES)
      if tag in ("colors", "color_attr"):
        assert {item.color for item in items} == set(scenes.COLORS)
      if tag == "counting":
        assert {item.count for item in items} == set(prompts.COUNTS)

  def test_prompts_are_distinct(self):
    assert len({record.text for record in ALL}) == len(ALL) == 1110

  def test_phrasing_follows_geneval(self):
    by_prompt = {record.text: record.to_json() for record in ALL}
    assert by_prompt["a photo of a heart right of a bow"] == {
      "tag": "position",
      "prompt": "a photo of a heart right of a bow",
      "include": [
        {"class": "bow", "count": 1},
        {"class": "heart", "count": 1, "position": ["right of", 0]},
      ],
    }
    assert by_prompt["a photo of three crosses"] == {
      "tag": "counting",
      "prompt": "a photo of three crosses",
      "include": [{"class": "cross", "count": 3}],
      "exclude": [{"class": "cross", "count": 4}],
    }
    assert by_prompt["a photo of a red ring and a blue spool"] == {
      "tag": "color_attr",
      "prompt": "a photo of a red ring and a blue spool",
      "include": [
        {"class": "ring", "count": 1, "color": "red"},
        {"class": "spool", "count": 1, "color": "blue"},
      ],
    }


class TestSceneFor:
  def test_holds_exactly_what_is_asked(self):
    rng = np.random.default_rng(0)
    for record in ALL:
      objects = scenes.objects_of(prompts.scene_for(record, rng))
      found = collections.Counter(
        scenes.SHAPES[shape] for shape, _, _ in objects
      )
      assert found == {item.class_name: item.count for item in record.include}
      for item in record.include:
        if item.color is not None:
          assert (
            scenes.SHAPES.index(item.class_name),
            scenes.COLORS.index(item.color),
          ) in {(shape, color) for shape, color, _ in objects}

  @pytest.mark.parametrize(
    "relation,axis,sign",
    [("left of", 1, -1), ("right of", 1, 1), ("above", 0, -1), ("below", 0, 1)],
  )
  def test_relation_holds_along_its_axis_only(self, relation, axis, sign):
    record = cases.prompt_of(
      {
        "include": [
          {"class": "bow", "count": 1},
          {"class": "ring", "count": 1, "position": [relation, 0]},
        ]
      }
    )
    rng = np.random.default_rng(0)
    pairs = set()
    for _ in range(300):
      place = {
        scenes.SHAPES[shape]: np.array(divmod(cell, 3))
        for shape, _, cell in scenes.objects_of(prompts.scene_for(record, rng))
      }
      offset = place["ring"] - place["bow"]
      assert offset[axis] * sign > abs(offset[1 - axis])
      pairs.add((*place["ring"], *place["bow"]))
    assert len(pairs) == 13

  def test_colors_and_cells_vary_where_free(self):
    record = cases.prompt_of({"include": [{"class": "bow", "count": 2}]})
    rng = np.random.default_rng(0)
    objects = sum(
      (scenes.objects_of(prompts.scene_for(record, rng)) for _ in range(100)),
      [],
    )
    assert {color for _, color, _ in objects} == set(range(6))
    assert {cell for _, _, cell in objects} == set(range(9))

"""Tests of rewards/geneval.py: hand-made detections for every tag, and what must always hold."""

import itertools
import random

import numpy as np
import pytest

from r3jax.data import geneval as generator
from r3jax.rewards import geneval
from r3jax.rewards import shapes as shapes_reward
from r3jax.worlds import prompts as world_prompts
from r3jax.worlds import shapes as world


def at(name, x=50.0, y=50.0, confidence=0.95, color=None, size=20.0) -> geneval.Detection:
  """Returns an object of a size with its centre at (x, y)."""
  return geneval.Detection(name, confidence, (x - size / 2, y - size / 2, x + size / 2, y + size / 2), color)


def asks(tag, *include, exclude=()):
  items = [dict(zip(("class", "count"), item[:2]), **(item[2] if len(item) > 2 else {})) for item in include]
  return {"tag": tag, "prompt": "p", "include": items} | (
      {"exclude": [{"class": name, "count": count} for name, count in exclude]} if exclude else {})


SINGLE = asks("single_object", ("bench", 1))
TWO = asks("two_object", ("bench", 1), ("cat", 1))
COUNT = asks("counting", ("clock", 3), exclude=[("clock", 4)])
COLOR = asks("colors", ("bench", 1, {"color": "red"}))
LEFT = asks("position", ("bear", 1), ("dog", 1, {"position": ["left of", 0]}))
RIGHT = asks("position", ("bear", 1), ("dog", 1, {"position": ["right of", 0]}))
ABOVE = asks("position", ("bear", 1), ("dog", 1, {"position": ["above", 0]}))
BELOW = asks("position", ("bear", 1), ("dog", 1, {"position": ["below", 0]}))
ATTR = asks("color_attr", ("bench", 1, {"color": "red"}), ("cat", 1, {"color": "blue"}))
SAME = asks("color_attr", ("cup", 1, {"color": "red"}), ("cup", 1, {"color": "blue"}))
RED_CUPS = asks("colors", ("cup", 2, {"color": "red"}))
BEAR = at("bear", 100, 100)
clocks = lambda *confidences: [at("clock", 30 * i, confidence=c) for i, c in enumerate(confidences)]
cups = lambda *colors: [at("cup", 30 * i, confidence=0.9 - i / 100, color=color) for i, color in enumerate(colors)]

# name: (record, detections, correct, strict, score)
CASES = {
    # single_object
    "one": (SINGLE, [at("bench")], 1, 1, 1),
    "none": (SINGLE, [], 0, 0, 0),
    "another class": (SINGLE, [at("chair")], 0, 0, 0),
    "other classes do not matter": (SINGLE, [at("bench"), at("chair"), at("cat")], 1, 1, 1),
    "two of one": (SINGLE, [at("bench"), at("bench", 90)], 1, 0, 0),
    "three of one": (SINGLE, [at("bench", 40 * i) for i in range(3)], 1, 0, 0),
    "surer than the threshold": (SINGLE, [at("bench", confidence=0.3001)], 1, 1, 1),
    "as sure as the threshold": (SINGLE, [at("bench", confidence=0.3)], 0, 0, 0),
    "less sure": (SINGLE, [at("bench", confidence=0.2999)], 0, 0, 0),
    "an unsure second does not count": (SINGLE, [at("bench"), at("bench", 90, confidence=0.29)], 1, 1, 1),
    "case of the name matters": (SINGLE, [at("Bench")], 0, 0, 0),
    # two_object
    "both": (TWO, [at("bench"), at("cat", 90)], 1, 1, 1),
    "both at one place": (TWO, [at("bench"), at("cat")], 1, 1, 1),
    "first only": (TWO, [at("bench")], 0, 0, 0.5),
    "second only": (TWO, [at("cat")], 0, 0, 0.5),
    "neither": (TWO, [at("dog")], 0, 0, 0),
    "first twice": (TWO, [at("bench"), at("bench", 90), at("cat")], 1, 0, 0.5),
    "first twice and no second": (TWO, [at("bench"), at("bench", 90)], 0, 0, 0),
    "second unsure": (TWO, [at("bench"), at("cat", confidence=0.3)], 0, 0, 0.5),
    "both of four": (TWO, [at("bench", i * 30) for i in range(4)] + [at("cat", i * 30) for i in range(4)], 1, 0, 0),
    # counting
    "exactly three": (COUNT, clocks(0.95, 0.95, 0.95), 1, 1, 1),
    "two of three": (COUNT, clocks(0.95, 0.95), 0, 0, 2 / 3),
    "one of three": (COUNT, clocks(0.95), 0, 0, 1 / 3),
    "none of three": (COUNT, [], 0, 0, 0),
    "four of three": (COUNT, clocks(*[0.95] * 4), 0, 0, 2 / 3),
    "five of three": (COUNT, clocks(*[0.95] * 5), 0, 0, 1 / 3),
    "six of three": (COUNT, clocks(*[0.95] * 6), 0, 0, 0),
    "sixteen of three": (COUNT, clocks(*[0.95] * 16), 0, 0, 0),
    "forty of three": (COUNT, clocks(*[0.95] * 40), 0, 0, 0),
    "counting needs .9": (COUNT, clocks(0.95, 0.95, 0.9), 0, 0, 2 / 3),
    "counting just above .9": (COUNT, clocks(0.95, 0.95, 0.9001), 1, 1, 1),
    "a fourth at .9 does not count": (COUNT, clocks(0.95, 0.95, 0.95, 0.9), 1, 1, 1),
    "without exclude more are official": (asks("counting", ("clock", 3)), clocks(*[0.95] * 4), 1, 0, 2 / 3),
    "exclude another class": (asks("counting", ("clock", 1), exclude=[("cat", 1)]), [at("clock"), at("cat")], 0, 0, 1),
    "exclude another class that is not there": (asks("counting", ("clock", 1), exclude=[("cat", 1)]), [at("clock")], 1, 1, 1),
    "seventeen of seventeen are sixteen": (asks("counting", ("clock", 17)), clocks(*[0.95] * 17), 0, 0, 16 / 17),
    # colors
    "right colour": (COLOR, [at("bench", color="red")], 1, 1, 1),
    "wrong colour": (COLOR, [at("bench", color="blue")], 0, 0, 0.5),
    "no colour": (COLOR, [at("bench")], 0, 0, 0.5),
    "no bench": (COLOR, [at("cat", color="red")], 0, 0, 0),
    "surest has the colour": (COLOR, [at("bench", color="red"), at("bench", 90, confidence=0.5, color="blue")], 1, 0, 0.5),
    "surest has another colour": (COLOR, [at("bench", color="blue"), at("bench", 90, confidence=0.5, color="red")], 0, 0, 0.5),
    "both have the colour": (COLOR, [at("bench", color="red"), at("bench", 90, color="red")], 1, 0, 0),
    "unsure colour does not count": (COLOR, [at("bench", color="red"), at("bench", 90, confidence=0.1, color="blue")], 1, 1, 1),
    "two red cups": (RED_CUPS, cups("red", "red"), 1, 1, 1),
    "one red cup of two": (RED_CUPS, cups("red", "blue"), 0, 0, 0.75),
    "no red cup of two": (RED_CUPS, cups("blue", "blue"), 0, 0, 0.5),
    "one red cup alone": (RED_CUPS, cups("red"), 0, 0, 0.5),
    "three red cups of two": (RED_CUPS, cups("red", "red", "red"), 1, 0, 0.5),
    "two red cups and a sure blue one": (RED_CUPS, cups("blue", "red", "red"), 0, 0, 0.75),
    "two red cups and an unsurer blue one": (RED_CUPS, cups("red", "red", "blue"), 1, 0, 0.75),
    # position; both are 20 wide, so that 4 pixels of an offset are taken off per axis
    "left": (LEFT, [BEAR, at("dog", 50, 100)], 1, 1, 1),
    "left, mirrored": (LEFT, [BEAR, at("dog", 150, 100)], 0, 0, 0.75),
    "right": (RIGHT, [BEAR, at("dog", 150, 100)], 1, 1, 1),
    "above": (ABOVE, [BEAR, at("dog", 100, 50)], 1, 1, 1),
    "below": (BELOW, [BEAR, at("dog", 100, 150)], 1, 1, 1),
    "below, but above": (BELOW, [BEAR, at("dog", 100, 50)], 0, 0, 0.75),
    "left of nothing": (LEFT, [at("dog", 50, 100)], 0, 0, 0.25),
    "nothing is left": (LEFT, [BEAR], 0, 0, 0.5),
    "neither is there": (LEFT, [], 0, 0, 0),
    "at the same place": (LEFT, [BEAR, at("dog", 100, 100)], 0, 0, 0.75),
    "nearer than the shrinking": (LEFT, [BEAR, at("dog", 96, 100)], 0, 0, 0.75),
    "half of a small offset is left": (LEFT, [BEAR, at("dog", 92, 100)], 0, 0, 0.75),  # (8 - 4) / 8 is not beyond 0.5
    "more than half is left": (LEFT, [BEAR, at("dog", 91.9, 100)], 1, 1, 1),
    "diagonal is left too": (LEFT, [BEAR, at("dog", 50, 50)], 1, 1, 1),  # 46 / 70.7
    "diagonal is above too": (ABOVE, [BEAR, at("dog", 50, 50)], 1, 1, 1),
    "steep is not left": (LEFT, [BEAR, at("dog", 70, 20)], 0, 0, 0.75),  # 26 / 85.4
    "wide objects are shrunk more": (LEFT, [at("bear", 100, 100, size=100), at("dog", 70, 100, size=100)], 0, 0, 0.75),
    "unsure bear is none": (LEFT, [at("bear", 100, 100, confidence=0.2), at("dog", 50, 100)], 0, 0, 0.25),
    "surest dog counts": (LEFT, [BEAR, at("dog", 50, 100), at("dog", 150, 100, confidence=0.5)], 1, 0, 0.75),
    "surest dog is right": (LEFT, [BEAR, at("dog", 50, 100, confidence=0.5), at("dog", 150, 100)], 0, 0, 0.5),
    "surest bear counts": (LEFT, [BEAR, at("bear", 0, 100, confidence=0.5), at("dog", 50, 100)], 1, 0, 0.5),
    "every pair must be related": (
        asks("position", ("bear", 2), ("dog", 1, {"position": ["left of", 0]})),
        [BEAR, at("bear", 20, 100), at("dog", 50, 100)], 0, 0, 0.75),
    # color_attr
    "both colours": (ATTR, [at("bench", color="red"), at("cat", 90, color="blue")], 1, 1, 1),
    "colours swapped": (ATTR, [at("bench", color="blue"), at("cat", 90, color="red")], 0, 0, 0.5),
    "one colour wrong": (ATTR, [at("bench", color="red"), at("cat", 90, color="red")], 0, 0, 0.75),
    "one object missing": (ATTR, [at("bench", color="red")], 0, 0, 0.5),
    "wrong colour and one missing": (ATTR, [at("bench", color="green")], 0, 0, 0.25),
    "a second cat": (ATTR, [at("bench", color="red"), at("cat", 90, color="blue"), at("cat", 20, confidence=0.5)], 1, 0, 0.75),
    # Both items look at the surest cup only, so that officially no image can be right: the rules are so.
    "two cups of two colours": (SAME, cups("red", "blue"), 0, 1, 1),
    "two cups of one colour": (SAME, cups("red", "red"), 0, 0, 0.5),
    "one cup of two": (SAME, cups("red"), 0, 0, 0.5),
}


class TestJudge:

  @pytest.mark.parametrize("name", CASES)
  def test_hand_made_case(self, name):
    record, detections, correct, strict, score = CASES[name]
    found = geneval.judge(record, detections)
    assert (found.correct, found.strict) == (bool(correct), bool(strict))
    assert found.score == pytest.approx(score, abs=1e-12)
    assert bool(found.reasons) != found.correct

  def test_table_is_large_and_has_every_tag(self):
    assert len(CASES) >= 60
    assert {case[0]["tag"] for case in CASES.values()} == set(world_prompts.TAGS)

  @pytest.mark.parametrize("record, detections, reason", [
      (COUNT, clocks(0.95), "expected at least 3 clock, found 1"),
      (COUNT, clocks(*[0.95] * 4), "expected fewer than 4 clock, found 4"),
      (COLOR, [at("bench", color="blue")], "expected 1 red bench, found the colours ['blue']"),
      (LEFT, [at("dog")], "there is no bear for dog to be left of"),
      (LEFT, [BEAR, at("dog", 150, 100)], "expected dog left of bear"),
  ])
  def test_reason_says_what_was_seen(self, record, detections, reason):
    assert reason in geneval.judge(record, detections).reasons

  def test_thresholds_are_used(self):
    record, detections = SINGLE, [at("bench", confidence=0.5)]
    assert geneval.judge(record, detections).correct
    assert not geneval.judge(record, detections, geneval.Thresholds(confidence=0.5)).correct
    near = [BEAR, at("dog", 92, 100)]
    assert geneval.judge(LEFT, near, geneval.Thresholds(position=0.05)).correct
    assert not geneval.judge(COUNT, clocks(*[0.95] * 3), geneval.Thresholds(max_objects=2)).correct

  def test_what_holds_for_all_detections(self):
    rng, records = random.Random(0), generator.generate(400, 0)
    for record in records:
      names = [item["class"] for item in record["include"]] + ["cat"]
      detections = [
          at(rng.choice(names), rng.uniform(0, 200), rng.uniform(0, 200), rng.random(), rng.choice(generator.COLORS))
          for _ in range(rng.randint(0, 8))
      ]
      found = geneval.judge(record, detections)
      assert 0 <= found.score <= 1
      assert not found.strict or found.correct
      assert found.strict == (found.score == 1 and not any("fewer" in reason for reason in found.reasons))
      shuffled = rng.sample(detections, len(detections))
      assert geneval.judge(record, shuffled) == found

  def test_equals_the_verifier_of_the_embedded_world(self):
    """With one sure object per cell the rules differ only where classes repeat or extras lie about."""
    rng, records = np.random.default_rng(0), world_prompts.heldout_records()
    for number in range(300):
      record = records[rng.integers(len(records))]
      scene = world_prompts.scene_for(record if number % 2 else records[rng.integers(len(records))], rng)
      objects = shapes_reward.detect(np.asarray(world.render(scene))[None])
      detections = [
          geneval.Detection(world.SHAPES[shape], 0.95, tuple(np.asarray(box)[[1, 0, 3, 2]]), world.COLORS[color])
          for shape, color, box in zip(objects.shape[0], objects.color[0], objects.box[0]) if shape >= 0
      ]
      found = geneval.judge(record, detections)
      expected = shapes_reward.score(objects, shapes_reward.encode_records([record]))
      named = {item["class"] for item in record["include"]}
      unnamed = any(detection.class_name not in named for detection in detections)
      if not unnamed:
        assert found.strict == bool(expected.parts["strict"][0]), (record, detections)
      if max((sum(d.class_name == name for d in detections) for name in named)) <= 1:
        assert found.correct == bool(expected.parts["correct"][0]), (record, detections)


class TestRelations:

  def test_one_of_four_or_two_on_a_diagonal(self):
    for dx, dy in itertools.product((-50, 0, 50), repeat=2):
      a, b = at("a", 100 + dx, 100 + dy), at("b", 100, 100)
      found = geneval.relations(a.box, b.box, 0.1)
      horizontal = {-50: {"left of"}, 0: set(), 50: {"right of"}}[dx]
      assert found == horizontal | {-50: {"above"}, 0: set(), 50: {"below"}}[dy]
      mirrored = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
      assert geneval.relations(b.box, a.box, 0.1) == {mirrored[name] for name in found}


class TestCheckRecord:

  @pytest.mark.parametrize("record, message", [
      ({"tag": "style", "prompt": "p", "questions": []}, "need a record with include items"),
      (asks("t", ("cow", 1, {"region": "left"})), r"do not know \['region'\] of include\[0\]; use a judge"),
      (asks("t", ("cow", 1), ("cat", 1, {"position": ["near", 0]})), "must be one of .*; got 'near'"),
      (asks("t", ("cow", 1, {"position": ["above", 1]}), ("cat", 1)), "must point to an item before it; got 1"),
  ])
  def test_record_that_cannot_be_judged_is_refused(self, record, message):
    with pytest.raises(ValueError, match=message):
      geneval.check_record(record)

  def test_generated_records_are_fine(self):
    for record in generator.generate(600, 1):
      geneval.check_record(record)


class TestThresholds:

  @pytest.mark.parametrize("changes", [{"confidence": 1.0}, {"position": -0.1}, {"max_objects": 0}])
  def test_bad_value_is_refused(self, changes):
    with pytest.raises(ValueError, match="must be"):
      geneval.Thresholds(**changes)

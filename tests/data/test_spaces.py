"""Tests of data/generators/spaces.py."""

import itertools

import pytest

from r3jax.data import records
from r3jax.data.generators import spaces


def space(tag, *choices):
  return spaces.Space(choices, lambda *chosen: records.Prompt(tag, chosen))


TAGS = {
  "few": (space("few", ("ab", 1)),),
  "many": (space("many", ("abc", 2), ((1, 2), 1)), space("more", ("xyz", 1))),
}


class TestSpace:
  def test_every_choice_has_one_number(self):
    numbered = space("", ("abcd", 2), ((1, 2, 3), 1), ("xy", 2))
    found = [numbered.prompt(index).text for index in range(numbered.size)]
    assert numbered.size == 12 * 3 * 2
    assert set(found) == set(
      itertools.product(
        itertools.permutations("abcd", 2),
        itertools.permutations((1, 2, 3), 1),
        itertools.permutations("xy"),
      )
    )


class TestDraw:
  def test_everything_is_drawn_once(self):
    prompts = spaces.draw(TAGS, 17, seed=0)
    assert len({(prompt.tag, prompt.text) for prompt in prompts}) == 17

  def test_tags_take_turns_and_within_them_their_spaces(self):
    tags = [prompt.tag for prompt in spaces.draw(TAGS, 12, seed=1)]
    assert tags == [
      "few",
      "many",
      "few",
      "more",
      "many",
      "more",
      "many",
      "more",
      "many",
      "many",
      "many",
      "many",
    ]

  def test_shorter_draw_begins_a_longer_one(self):
    longest = spaces.draw(TAGS, 17, seed=3)
    for number in range(1, 17):
      assert spaces.draw(TAGS, number, seed=3) == longest[:number]

  def test_seed_decides_the_order(self):
    draws = [
      spaces.draw({"x": (space("x", (range(10**4), 2)),)}, 5, seed)
      for seed in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]

  def test_every_order_is_as_likely(self):
    tags = {"x": (space("x", ("abc", 1)),)}
    orders = [
      tuple(prompt.text for prompt in spaces.draw(tags, 3, seed))
      for seed in range(600)
    ]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 6 and min(counts) > 70 and max(counts) < 130

  @pytest.mark.parametrize("number", [0, -1, 12])
  def test_impossible_number_is_refused(self, number):
    tags = {
      "few": TAGS["few"],
      "many": (space("many", ("abc", 2)), space("more", ("xyz", 1))),
    }
    with pytest.raises(ValueError) as error:
      spaces.draw(tags, number, seed=0)
    assert str(error.value) == (
      f"number must be at least 1 and at most the 11 prompts that exist, got {number}"
    )

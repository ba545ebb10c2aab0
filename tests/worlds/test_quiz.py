"""Tests of worlds/quiz.py: answers are those of the scene, and no word gives them away."""

import collections

import numpy as np
import pytest

from r3jax.worlds.shapes import edits
from r3jax.worlds.shapes import grammar
from r3jax.worlds.shapes import prompts
from r3jax.worlds.shapes import quiz
from r3jax.worlds.shapes import scenes
from r3jax.worlds.shapes import vocabulary


def scene(rng: np.random.Generator) -> list[tuple[int, int, int]]:
  cells = rng.permutation(9)[: rng.integers(0, 6)]
  return sorted(
    [(int(rng.integers(6)), int(rng.integers(6)), int(cell)) for cell in cells],
    key=lambda item: item[2],
  )


@pytest.fixture(name="asked", scope="module")
def fixture_asked():
  """kind -> [(objects, question, answer)]."""
  found, rng = collections.defaultdict(list), np.random.default_rng(0)
  for _ in range(600):
    objects = scene(rng)
    for kind, ask in quiz.KINDS.items():
      if made := ask(objects, rng):
        found[kind].append((objects, *made))
  return found


class TestAnswers:
  def test_existence(self, asked):
    for objects, question, answer in asked["existence"]:
      _, _, _, color, shape, _ = question.split()
      there = any(
        item[:2] == (scenes.SHAPES.index(shape), scenes.COLORS.index(color))
        for item in objects
      )
      assert answer == ("yes" if there else "no")

  def test_a_no_is_near_to_what_is_there(self, asked):
    for objects, question, answer in asked["existence"]:
      _, _, _, color, shape, _ = question.split()
      if answer == "no" and objects:
        assert any(
          scenes.SHAPES[s] == shape or scenes.COLORS[c] == color
          for s, c, _ in objects
        )

  def test_count(self, asked):
    plural = {name: shape for shape, name in prompts.PLURALS.items()}
    for objects, question, answer in asked["count"]:
      shape = scenes.SHAPES.index(plural[question.split()[2]])
      assert (
        answer == grammar.NUMBERS[sum(item[0] == shape for item in objects)]
      )

  def test_color(self, asked):
    for objects, question, answer in asked["color"]:
      *_, shape, _, cell, _ = question.split()
      assert (
        scenes.SHAPES.index(shape),
        scenes.COLORS.index(answer),
        scenes.CELLS.index(cell),
      ) in objects

  def test_relation(self, asked):
    for objects, question, answer in asked["relation"]:
      _, _, other, *relation, _, base, _ = question.split()
      places = {scenes.SHAPES[shape]: cell for shape, _, cell in objects}
      holds = (places[base], places[other]) in edits.related_cells(
        " ".join(relation)
      )
      assert answer == ("yes" if holds else "no")

  def test_yes_is_about_half_where_there_is_something(self, asked):
    for kind in ("existence", "relation"):
      words = [answer for objects, _, answer in asked[kind] if objects]
      assert 0.35 < words.count("yes") / len(words) < 0.6, kind

  def test_words_are_known_to_the_small_model(self, asked):
    tokenizer = vocabulary.build_tokenizer()
    for kind, rows in asked.items():
      for _, question, answer in rows[:50]:
        for word in (question, answer):
          assert "<unk>" not in tokenizer.encode(word).tokens and len(
            tokenizer.encode(word).ids
          ) == len(word.split()), kind

  def test_empty_scene_has_neither_colour_nor_relation(self):
    rng = np.random.default_rng(0)
    assert quiz.color([], rng) is None and quiz.relation([], rng) is None
    assert (
      quiz.count([], rng)[1] == "zero" and quiz.existence([], rng)[1] == "no"
    )

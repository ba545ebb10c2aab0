"""Tests of evaluation/questions.py."""

import jax
import numpy as np
import pytest

from r3jax import types
from r3jax.evaluation import chains
from r3jax.evaluation import questions
from r3jax.worlds.shapes import batches
from r3jax.worlds.shapes import prompts
from r3jax.worlds.shapes import scenes as scenes_lib
from r3jax.worlds.shapes import world

QUIZ = world.WORLD.quiz
KINDS = ("match", "existence", "count", "color", "relation")


@pytest.fixture(name="drafts", scope="module")
def fixture_drafts():
  scenes = [batches.dense_scene(i, seed=4) for i in range(6)]
  stacked = jax.tree.map(
    lambda *x: np.stack(x),
    *[scene.replace(ghost_shape=np.full(9, -1)) for scene in scenes],
  )
  score = types.Score(
    np.full(6, 0.5),
    np.array([True] * 5 + [False]),
    {"strict": np.array([1.0, 0, 1, 0, 1, 1])},
  )
  return chains.ScoredImages(np.asarray(scenes_lib.render(stacked)), score)


class TestQuestionnaire:
  ROWS = np.array([[i, 0] for i in range(6)])
  RECORDS = prompts.heldout_records()[:6]

  def test_match_is_what_strict_says_and_not_asked_without_a_score(
    self, drafts
  ):
    asked = questions.Questionnaire(("match",), QUIZ, 0).questions(
      drafts, self.RECORDS, self.ROWS
    )["match"]
    assert [one and one.expected for one in asked] == [
      "yes",
      "no",
      "yes",
      "no",
      "yes",
      None,
    ]
    assert asked[0].text == f"does the image match : {self.RECORDS[0].text} ?"

  def test_questions_depend_on_the_image_and_its_numbers_alone(self, drafts):
    questionnaire = questions.Questionnaire(KINDS, QUIZ, 0)
    every = questionnaire.questions(drafts, self.RECORDS, self.ROWS)
    part = jax.tree.map(lambda x: x[2:4], drafts)
    assert {
      kind: asked[2:4] for kind, asked in every.items()
    } == questionnaire.questions(part, self.RECORDS[2:4], self.ROWS[2:4])
    assert list(every) == list(KINDS)

  def test_other_images_of_a_prompt_are_asked_other_things(self, drafts):
    questionnaire = questions.Questionnaire(("count",), QUIZ, 0)
    asked = [
      questionnaire.questions(drafts, self.RECORDS, self.ROWS + [0, j])["count"]
      for j in range(4)
    ]
    assert any(first != second for first, second in zip(asked, asked[1:]))

  def test_without_the_embedded_world_only_the_match_can_be_asked(self, drafts):
    (one, *_) = questions.Questionnaire(("match",), None, 0).questions(
      drafts, self.RECORDS, self.ROWS
    )["match"]
    assert self.RECORDS[0].text in one.text and one.text.endswith(
      "Answer yes or no."
    )
    with pytest.raises(
      ValueError, match=r"eval.ask must hold nothing but \('match',\)"
    ):
      questions.Questionnaire(("match", "count"), None, 0)


class TestAnswerIn:
  @pytest.mark.parametrize(
    "text, word",
    [
      ("<think> a red ring </think> yes", "yes"),
      ("<think>It does.</think>\nYes, it matches.", "yes"),
      ("<think> </think> No!", "no"),
      ("<think> two rings </think> two", "two"),
      ("yes", ""),
      ("<think> yes </think>", ""),
      ("<think> yes", ""),
    ],
  )
  def test_first_word_behind_the_thought(self, text, word):
    assert questions.answer_in(text) == word

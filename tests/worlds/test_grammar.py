"""Tests of the world's text."""

import collections

import numpy as np

from r3jax.sequence import tokenization
from r3jax.worlds.shapes import edits as edits_lib
from r3jax.worlds.shapes import grammar
from r3jax.worlds.shapes import prompts
from r3jax.worlds.shapes import scenes
from r3jax.worlds.shapes import vocabulary
from tests.worlds import cases

RED, BLUE = scenes.COLORS.index("red"), scenes.COLORS.index("blue")
SQUARE, RING = scenes.SHAPES.index("square"), scenes.SHAPES.index("ring")
TOP_LEFT, CENTER, RIGHT, BOTTOM = 0, 4, 5, 7


class TestDescribe:
  def test_cell_order(self):
    objects = [(RING, BLUE, CENTER), (SQUARE, RED, TOP_LEFT)]
    assert grammar.describe(objects) == "red square top-left , blue ring center"
    assert grammar.plan_text(objects) == (
      "<think> red square top-left , blue ring center </think>"
    )

  def test_empty_scene(self):
    assert grammar.plan_text([]) == "<think> </think>"

  def test_smudges_stand_among_the_objects(self):
    text = grammar.describe(
      [(SQUARE, RED, TOP_LEFT), (RING, BLUE, BOTTOM)], [CENTER]
    )
    assert text == "red square top-left , smudge center , blue ring bottom"


class TestObjectsIn:
  def test_reads_back_plans_and_answers(self):
    rng = np.random.default_rng(0)
    for size in range(7):
      objects = sorted(
        cases.random_objects(rng, size), key=lambda item: item[2]
      )
      assert cases.objects_in(grammar.plan_text(objects)) == objects
      assert cases.objects_in(grammar.reflect_answer(objects, [])) == objects


class TestInstructionText:
  def test_sentences(self):
    def text(kind, value=-1):
      return grammar.instruction_text(
        [edits_lib.Operation(kind, SQUARE, RED, CENTER, value)]
      )

    assert text("add") == "add a red square at center"
    assert text("remove") == "remove the red square at center"
    assert text("recolor", BLUE) == "change the red square at center to blue"
    assert (
      text("replace", RING) == "replace the red square at center with a ring"
    )
    assert text("move", BOTTOM) == "move the red square at center to bottom"
    assert grammar.instruction_text([]) == "no further edit needed"

  def test_sentences_about_smudges(self):
    edits = [
      edits_lib.Operation("wipe", -1, -1, TOP_LEFT),
      edits_lib.Operation("redraw", RING, BLUE, CENTER),
    ]
    assert grammar.instruction_text(edits) == (
      "remove the smudge at top-left and replace the smudge at center with a blue ring"
    )


class TestReflectAnswer:
  def test_answer(self):
    edits = [edits_lib.Operation("recolor", SQUARE, BLUE, CENTER, RED)]
    assert grammar.reflect_answer([(SQUARE, BLUE, CENTER)], edits) == (
      "<think> blue square center : color </think> change the blue square at center to red"
    )
    assert (
      grammar.reflect_answer([], [])
      == "<think> : ok </think> no further edit needed"
    )

  def test_length_is_bounded(self):
    rng = np.random.default_rng(13)
    for _ in range(500):
      objects = cases.random_objects(rng, 6)
      answer = grammar.reflect_answer(
        objects, edits_lib.random_operations(objects, rng, 2)
      )
      assert len(answer.split()) <= 40


class TestRelated:
  def test_says_what_holds_whatever_was_asked(self):
    rng, seen = np.random.default_rng(17), collections.Counter()
    for record, objects in cases.draw(rng, 3000):
      pair = grammar.related(record, objects)
      if pair is None:
        continue
      assert record.tag == "position"
      asked = record.text.removeprefix("a photo of ").replace("a ", "")
      first, second = (scenes.SHAPES[item[0]] for item in pair.objects)
      assert asked.startswith(f"{first} ") and asked.endswith(f" {second}")
      assert sorted(pair.objects) == sorted(objects)
      right = f"{first} {pair.relation} {second}" == asked
      assert right == cases.fulfilled(record, objects)
      seen[right] += 1
    assert min(seen[True], seen[False]) > 50

  def test_says_nothing_where_nothing_can_be_said(self):
    record = next(
      r for r in cases.RECORDS if r.text == "a photo of a square left of a ring"
    )
    square, ring = (SQUARE, RED, TOP_LEFT), (RING, BLUE, 1)
    assert grammar.related(record, [ring, square]) == grammar.Related(
      (square, ring), "left of"
    )
    # on the diagonal
    assert (
      grammar.related(record, [square, (RING, BLUE, CENTER)]).relation == ""
    )
    assert grammar.related(record, [square]) is None
    assert grammar.related(record, [square, (SQUARE, RED, 1)]) is None
    assert grammar.related(record, [square, ring, (RING, RED, BOTTOM)]) is None
    assert grammar.related(cases.RECORDS[0], [square, ring]) is None

  def test_is_told_in_the_order_of_the_prompt(self):
    objects = [(RING, BLUE, TOP_LEFT), (SQUARE, RED, 1)]
    pair = grammar.Related(tuple(objects[::-1]), "right of")
    answer = grammar.reflect_answer(objects, [], pair=pair)
    assert answer.startswith(
      "<think> red square top , blue ring top-left : right of ok </think>"
    )


class TestClauseQuestions:
  def test_relation_and_presence(self):
    record = next(
      r for r in cases.RECORDS if r.tag == "position" and "left of" in r.text
    )
    right = scenes.objects_of(
      prompts.scene_for(record, np.random.default_rng(14))
    )
    answers = [answer for _, answer in grammar.clause_questions(record, right)]
    assert answers == ["yes", "yes", "yes"]
    flawed = edits_lib.flawed_plan(record, right, np.random.default_rng(15))
    assert [a for _, a in grammar.clause_questions(record, flawed)] == [
      "yes",
      "yes",
      "no",
    ]

  def test_count_is_exact(self):
    record = cases.prompt_of({"include": [{"class": "ring", "count": 2}]})
    for size, answer in ((1, "no"), (2, "yes"), (3, "no")):
      rings = [(RING, RED, cell) for cell in range(size)]
      assert grammar.clause_questions(record, rings) == [
        ("are there two rings ?", answer)
      ]


class TestQuestionAnswer:
  def test_match_answers_are_right(self):
    rng = np.random.default_rng(16)
    answers = collections.Counter()
    for record, objects in cases.draw(rng, 1500):
      question, word = grammar.question_and_word(objects, record, rng)
      answer = grammar.answer_text(objects, word)
      thought, _, word = answer.rpartition(" ")
      assert thought == grammar.plan_text(objects)
      answers[word] += 1
      if question == grammar.match_question(record.text):
        assert word == ("yes" if cases.fulfilled(record, objects) else "no")
      elif question.startswith("what color is the"):
        shape, cell = question.split()[4], question.split()[6]
        assert f"{word} {shape} {cell}" in thought
    assert min(answers["yes"], answers["no"]) > 300
    assert len(set(answers) & set(scenes.COLORS)) == 6


class TestVocabulary:
  def test_every_word_and_prompt_round_trips(self):
    tokenizer = tokenization.TextTokenizer(vocabulary.build_tokenizer())
    texts = [r.text for r in cases.RECORDS] + sorted(grammar.WORDS)
    texts += [grammar.match_question(r.text) for r in cases.RECORDS]
    for text in texts:
      assert tokenizer.decode(tokenizer.encode(text)) == text

  def test_ids_are_fixed(self):
    ids = tokenization.TextTokenizer(vocabulary.build_tokenizer()).vocabulary
    assert sorted(ids.values()) == list(range(96))
    first = [
      "<pad>",
      *tokenization.SPECIAL_TOKENS.values(),
      "<think>",
      "</think>",
      "<unk>",
      ",",
    ]
    assert [ids[token] for token in first] == list(range(9))

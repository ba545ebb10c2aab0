"""Tests of the world's text and of its edit logic, against an independent rule checker."""

import collections

import numpy as np
import pytest

from r3jax.sequence import tokenizer as tokenizer_lib
from r3jax.worlds import grammar
from r3jax.worlds import prompts
from r3jax.worlds import shapes
from r3jax.worlds import vocabulary

RECORDS = prompts.train_records() + prompts.heldout_records()
RED, BLUE = shapes.COLORS.index("red"), shapes.COLORS.index("blue")
SQUARE, RING = shapes.SHAPES.index("square"), shapes.SHAPES.index("ring")
TOP_LEFT, CENTER, RIGHT, BOTTOM = 0, 4, 5, 7


def _fulfilled(record, objects):
  """Independent of the package: exact counts, colours, relation, nothing else."""
  classes = collections.Counter(shapes.SHAPES[shape] for shape, _, _ in objects)
  if classes != collections.Counter({i["class"]: i["count"] for i in record["include"]}):
    return False
  by_class = {shapes.SHAPES[shape]: (shapes.COLORS[color], cell) for shape, color, cell in objects}
  for item in record["include"]:
    color, cell = by_class[item["class"]]
    if item.get("color", color) != color:
      return False
    if "position" in item:
      base = by_class[record["include"][item["position"][1]]["class"]][1]
      right, down = cell % 3 - base % 3, cell // 3 - base // 3
      along = {"left of": -right, "right of": right, "above": -down, "below": down}
      relation = item["position"][0]
      across = down if relation in ("left of", "right of") else right
      if along[relation] <= abs(across):
        return False
  return True


def _random_objects(rng, size):
  cells = rng.permutation(9)[:size]
  return [(int(rng.integers(6)), int(rng.integers(6)), int(cell)) for cell in cells]


def _cases(rng, count):
  """Yields records of every tag with right, flawed, edited, random and empty scenes."""
  by_tag = {tag: [r for r in RECORDS if r["tag"] == tag] for tag in prompts.TAGS}
  for i in range(count):
    records = by_tag[prompts.TAGS[i % 6]]
    record = records[rng.integers(len(records))]
    right = shapes.objects_of(prompts.scene_for(record, rng))
    match rng.integers(4):
      case 0:
        yield record, right
      case 1:
        yield record, grammar.flawed_plan(record, right, rng)
      case 2:
        yield record, grammar.apply(grammar.random_operations(right, rng, 2), right)
      case 3:
        yield record, _random_objects(rng, int(rng.integers(7)))


def _neighbours(objects):
  """Yields every scene one operation away."""
  present = {cell: (shape, color) for shape, color, cell in objects}
  for cell in range(9):
    rest = [item for item in objects if item[2] != cell]
    if cell not in present:
      yield from ([*objects, (s, c, cell)] for s in range(6) for c in range(6))
      continue
    shape, color = present[cell]
    yield rest
    yield from ([*rest, (s, color, cell)] for s in range(6) if s != shape)
    yield from ([*rest, (shape, c, cell)] for c in range(6) if c != color)
    yield from ([*rest, (shape, color, c)] for c in range(9) if c not in present)


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
    text = grammar.describe([(SQUARE, RED, TOP_LEFT), (RING, BLUE, BOTTOM)], [CENTER])
    assert text == "red square top-left , smudge center , blue ring bottom"


class TestObjectsIn:

  def test_reads_back_plans_and_answers(self):
    rng = np.random.default_rng(0)
    for size in range(7):
      objects = sorted(_random_objects(rng, size), key=lambda item: item[2])
      assert grammar.objects_in(grammar.plan_text(objects)) == objects
      assert grammar.objects_in(grammar.reflect_answer(objects, [])) == objects


class TestSatisfied:

  def test_equals_independent_rules(self):
    outcomes = []
    for record, objects in _cases(np.random.default_rng(1), 1500):
      outcomes.append(_fulfilled(record, objects))
      assert grammar.satisfied(record, objects) == outcomes[-1], (record, objects)
    assert 0.2 < np.mean(outcomes) < 0.5


class TestRelatedCells:

  def test_pairs(self):
    assert (CENTER, RIGHT) in grammar.related_cells("right of")
    assert (CENTER, TOP_LEFT) not in grammar.related_cells("above")  # the diagonal is unclear
    assert len(grammar.related_cells("above")) == 13  # 9 in a column, 4 two rows apart

  def test_scenes_of_prompts_agree(self):
    rng = np.random.default_rng(2)
    for record in [r for r in RECORDS if r["tag"] == "position"]:
      assert grammar.satisfied(record, shapes.objects_of(prompts.scene_for(record, rng)))


class TestFlawedPlan:

  def test_violates_every_record(self):
    rng = np.random.default_rng(3)
    for record in RECORDS:
      right = shapes.objects_of(prompts.scene_for(record, rng))
      flawed = grammar.flawed_plan(record, right, rng)
      assert _fulfilled(record, right)
      assert not _fulfilled(record, flawed), (record, flawed)
      assert len({cell for _, _, cell in flawed}) == len(flawed)

  def test_typical_errors(self):
    rng = np.random.default_rng(4)
    a, b, c = (SQUARE, RED, 0), (SQUARE, BLUE, 1), (SQUARE, RED, 2)
    assert grammar.flawed_plan({"tag": "counting"}, [a, b, c], rng) == [a, b]
    assert len(grammar.flawed_plan({"tag": "counting"}, [a, b], rng)) == 3
    pair = [(SQUARE, RED, 0), (RING, BLUE, 4)]
    assert grammar.flawed_plan({"tag": "color_attr"}, pair, rng) == [
        (SQUARE, BLUE, 0), (RING, RED, 4)
    ]
    assert grammar.flawed_plan({"tag": "position"}, pair, rng) == [
        (RING, BLUE, 0), (SQUARE, RED, 4)
    ]

  def test_unknown_tag_is_refused(self):
    with pytest.raises(ValueError, match="was 'sizes'"):
      grammar.flawed_plan({"tag": "sizes"}, [], np.random.default_rng(0))


class TestEditsTowards:

  def test_applying_reaches_the_record(self):
    rng = np.random.default_rng(5)
    for record, objects in _cases(rng, 1500):
      edits = grammar.edits_towards(record, objects, rng)
      assert _fulfilled(record, grammar.apply(edits, objects)), (record, objects, edits)

  def test_each_instruction_brings_the_scene_closer(self):
    rng = np.random.default_rng(6)
    for record, objects in _cases(rng, 300):
      distance = len(grammar.edits_towards(record, objects, rng))
      while distance:
        edits = grammar.edits_towards(record, objects, rng)[: grammar.MAX_OPERATIONS]
        objects = grammar.apply(edits, objects)
        left = len(grammar.edits_towards(record, objects, rng))
        assert left == distance - len(edits)
        distance = left
      assert _fulfilled(record, objects)

  def test_no_shorter_way_exists(self):
    # The number of edits is 0 only at a solution and falls by at most 1 with any operation.
    rng = np.random.default_rng(7)
    for record, objects in _cases(rng, 36):
      distance = len(grammar.edits_towards(record, objects, rng))
      for other in _neighbours(objects):
        assert len(grammar.edits_towards(record, other, rng)) >= distance - 1, (record, other)

  def test_full_grid_can_be_mended(self):
    rng = np.random.default_rng(8)
    for i in range(200):
      record, objects = RECORDS[(37 * i) % len(RECORDS)], _random_objects(rng, 9)
      assert _fulfilled(record, grammar.apply(grammar.edits_towards(record, objects, rng), objects))

  def test_swapped_colors_are_recolored(self):
    record = {"tag": "color_attr", "include": [
        {"class": "square", "count": 1, "color": "red"},
        {"class": "ring", "count": 1, "color": "blue"},
    ]}
    objects = [(SQUARE, BLUE, TOP_LEFT), (RING, RED, CENTER)]
    edits = grammar.edits_towards(record, objects, np.random.default_rng(9))
    assert grammar.instruction_text(edits) == (
        "change the blue square at top-left to red and change the red ring at center to blue"
    )

  def test_extra_object_of_another_class_is_removed(self):
    record = {"tag": "single_object", "include": [{"class": "ring", "count": 1}]}
    objects = [(RING, RED, BOTTOM), (SQUARE, RED, CENTER)]
    edits = grammar.edits_towards(record, objects, np.random.default_rng(10))
    assert edits == [grammar.Operation("remove", SQUARE, RED, CENTER)]


class TestEditsOfSmudged:

  def test_missing_object_is_drawn_in_place_of_the_smudge(self):
    record = next(r for r in RECORDS if r["prompt"] == "a photo of a red square")
    edits = grammar.edits_of_smudged(record, [], [CENTER], np.random.default_rng(0))
    assert edits == [grammar.Operation("redraw", SQUARE, RED, CENTER)]

  def test_superfluous_smudge_is_wiped(self):
    record = next(r for r in RECORDS if r["prompt"] == "a photo of a red square")
    edits = grammar.edits_of_smudged(record, [(SQUARE, RED, TOP_LEFT)], [CENTER], np.random.default_rng(0))
    assert edits == [grammar.Operation("wipe", -1, -1, CENTER)]

  def test_applying_reaches_the_record_and_leaves_no_smudge(self):
    rng = np.random.default_rng(15)
    kinds = collections.Counter()
    for record, objects in _cases(rng, 1000):
      free = sorted(set(range(9)) - {cell for _, _, cell in objects})
      smudges = rng.permutation(free)[: rng.integers(3)].tolist()
      edits = grammar.edits_of_smudged(record, objects, smudges, rng)
      assert _fulfilled(record, grammar.apply(edits, objects))
      mended = [edit.cell for edit in edits if edit.kind in ("redraw", "wipe")]
      assert sorted(mended) == sorted(smudges)
      kinds.update(edit.kind for edit in edits)
    assert min(kinds["redraw"], kinds["wipe"]) > 100


class TestApply:

  def test_operations(self):
    objects = [(SQUARE, RED, CENTER)]
    def edited(kind, value):
      return grammar.apply([grammar.Operation(kind, SQUARE, RED, CENTER, value)], objects)

    assert edited("remove", -1) == []
    assert edited("recolor", BLUE) == [(SQUARE, BLUE, CENTER)]
    assert edited("replace", RING) == [(RING, RED, CENTER)]
    assert edited("move", BOTTOM) == [(SQUARE, RED, BOTTOM)]
    added = grammar.apply([grammar.Operation("add", RING, BLUE, TOP_LEFT)], objects)
    assert added == [(RING, BLUE, TOP_LEFT), (SQUARE, RED, CENTER)]

  def test_wrong_object_is_refused(self):
    with pytest.raises(ValueError, match="must be in the scene"):
      grammar.apply([grammar.Operation("remove", RING, RED, CENTER)], [(SQUARE, RED, CENTER)])

  def test_taken_cell_is_refused(self):
    with pytest.raises(ValueError, match="must be empty"):
      grammar.apply([grammar.Operation("add", RING, RED, CENTER)], [(SQUARE, RED, CENTER)])


class TestRandomOperations:

  def test_every_operation_changes_the_scene(self):
    rng = np.random.default_rng(11)
    kinds = collections.Counter()
    for _ in range(2000):
      objects = sorted(_random_objects(rng, int(rng.integers(7))), key=lambda item: item[2])
      operations = grammar.random_operations(objects, rng, 2)
      assert 1 <= len(operations) <= 2
      edited = grammar.apply(operations, objects)
      assert edited != objects
      assert len(edited) <= grammar.MAX_OBJECTS
      kinds.update(operation.kind for operation in operations)
    assert min(kinds[kind] for kind in ("add", "remove", "recolor", "replace", "move")) > 300


class TestFlawedInstruction:

  def test_never_helps(self):
    rng = np.random.default_rng(12)
    counts = collections.Counter()
    for record, objects in _cases(rng, 1200):
      distance = len(grammar.edits_towards(record, objects, rng))
      flawed = grammar.flawed_instruction(record, objects, rng)
      counts[(distance > 0, len(flawed))] += 1
      try:
        edited = grammar.apply(flawed, objects)
      except ValueError:  # names an object that is not there
        continue
      assert len(grammar.edits_towards(record, edited, rng)) >= distance
    assert counts[(False, 0)] == 0
    assert min(counts[(True, 0)], counts[(True, 1)], counts[(False, 1)]) > 200

  def test_needless_edit_on_a_right_scene(self):
    record = {"tag": "single_object", "include": [{"class": "ring", "count": 1}]}
    flawed = grammar.flawed_instruction(record, [(RING, RED, 3)], np.random.default_rng(0))
    assert len(flawed) == 1


class TestInstructionText:

  def test_sentences(self):
    def text(kind, value=-1):
      return grammar.instruction_text([grammar.Operation(kind, SQUARE, RED, CENTER, value)])

    assert text("add") == "add a red square at center"
    assert text("remove") == "remove the red square at center"
    assert text("recolor", BLUE) == "change the red square at center to blue"
    assert text("replace", RING) == "replace the red square at center with a ring"
    assert text("move", BOTTOM) == "move the red square at center to bottom"
    assert grammar.instruction_text([]) == "no further edit needed"


  def test_sentences_about_smudges(self):
    edits = [grammar.Operation("wipe", -1, -1, TOP_LEFT), grammar.Operation("redraw", RING, BLUE, CENTER)]
    assert grammar.instruction_text(edits) == (
        "remove the smudge at top-left and replace the smudge at center with a blue ring"
    )


class TestReflectAnswer:

  def test_answer(self):
    edits = [grammar.Operation("recolor", SQUARE, BLUE, CENTER, RED)]
    assert grammar.reflect_answer([(SQUARE, BLUE, CENTER)], edits) == (
        "<think> blue square center : color </think> change the blue square at center to red"
    )
    assert grammar.reflect_answer([], []) == "<think> : ok </think> no further edit needed"

  def test_length_is_bounded(self):
    rng = np.random.default_rng(13)
    for _ in range(500):
      objects = _random_objects(rng, 6)
      answer = grammar.reflect_answer(objects, grammar.random_operations(objects, rng, 2))
      assert len(answer.split()) <= 40


class TestClauseQuestions:

  def test_relation_and_presence(self):
    record = next(r for r in RECORDS if r["tag"] == "position" and "left of" in r["prompt"])
    right = shapes.objects_of(prompts.scene_for(record, np.random.default_rng(14)))
    answers = [answer for _, answer in grammar.clause_questions(record, right)]
    assert answers == ["yes", "yes", "yes"]
    flawed = grammar.flawed_plan(record, right, np.random.default_rng(15))
    assert [a for _, a in grammar.clause_questions(record, flawed)] == ["yes", "yes", "no"]

  def test_count_is_exact(self):
    record = {"include": [{"class": "ring", "count": 2}]}
    for size, answer in ((1, "no"), (2, "yes"), (3, "no")):
      rings = [(RING, RED, cell) for cell in range(size)]
      assert grammar.clause_questions(record, rings) == [("are there two rings ?", answer)]


class TestQuestionAnswer:

  def test_match_answers_are_right(self):
    rng = np.random.default_rng(16)
    answers = collections.Counter()
    for record, objects in _cases(rng, 1500):
      question, answer = grammar.question_answer(objects, record, rng)
      thought, _, word = answer.rpartition(" ")
      assert thought == grammar.plan_text(objects)
      answers[word] += 1
      if question == grammar.match_question(record["prompt"]):
        assert word == ("yes" if _fulfilled(record, objects) else "no")
      elif question.startswith("what color is the"):
        shape, cell = question.split()[4], question.split()[6]
        assert f"{word} {shape} {cell}" in thought
    assert min(answers["yes"], answers["no"]) > 300
    assert len(set(answers) & set(shapes.COLORS)) == 6


class TestVocabulary:

  def test_every_word_and_prompt_round_trips(self):
    tokenizer = tokenizer_lib.TextTokenizer(vocabulary.build_tokenizer())
    texts = [r["prompt"] for r in RECORDS] + sorted(grammar.WORDS)
    texts += [grammar.match_question(r["prompt"]) for r in RECORDS]
    for text in texts:
      assert tokenizer.decode(tokenizer.encode(text)) == text

  def test_ids_are_fixed(self):
    ids = tokenizer_lib.TextTokenizer(vocabulary.build_tokenizer()).vocabulary
    assert sorted(ids.values()) == list(range(96))
    first = ["<pad>", *tokenizer_lib.SPECIAL_TOKENS.values(), "<think>", "</think>", "<unk>", ","]
    assert [ids[token] for token in first] == list(range(9))

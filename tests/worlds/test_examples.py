"""Tests of the supervised examples."""

import collections
import time

import numpy as np
import pytest

from r3jax.sequence import protocol
from r3jax.sequence import tokenization
from r3jax.worlds.shapes import edits
from r3jax.worlds.shapes import examples
from r3jax.worlds.shapes import grammar
from r3jax.worlds.shapes import prompts
from r3jax.worlds.shapes import scenes
from r3jax.worlds.shapes import vocabulary
from tests.worlds import cases

RECORDS = prompts.train_records()
# Slots of the longest text, begin and end included.
LONGEST = {
  "prompt": 12,
  "thought": 19,
  "reflect answer": 42,
  "instruction": 21,
  "reflection question": 14,
  "question": 18,
  "question answer": 28,
  "description": 39,
}


def _records(rng, count):
  return [RECORDS[i] for i in rng.integers(len(RECORDS), size=count)]


def _same(scene, other, cell):
  """Tells whether a cell is drawn alike in two scenes."""
  if scene.shape[cell] < 0 or other.shape[cell] < 0:
    return scene.shape[cell] == other.shape[cell]
  fields = ("shape", "color", "size", "dy", "dx", "ghost_shape")
  return all(getattr(scene, f)[cell] == getattr(other, f)[cell] for f in fields)


class TestReasonExample:
  def test_scene_follows_the_thought(self):
    rng = np.random.default_rng(0)
    right = 0
    for record in _records(rng, 1000):
      example = examples.reason_example(record, rng, flaw_rate=0.6)
      objects = scenes.objects_of(example.scene)
      assert cases.objects_in(example.thought) == objects
      assert example.prompt == record.text
      right += edits.satisfied(record, objects)
    assert right / 1000 == pytest.approx(0.4, abs=0.05)

  def test_same_seed_gives_same_examples(self):
    thoughts = []
    for _ in range(2):
      rng = np.random.default_rng(1)
      thoughts.append(
        [examples.reason_example(r, rng, 0.5).thought for r in RECORDS[:50]]
      )
    assert thoughts[0] == thoughts[1]


class TestReflectExample:
  def test_without_flaws_stop_means_satisfied(self):
    rng = np.random.default_rng(2)
    stops = smudged = 0
    for record in _records(rng, 1000):
      example = examples.reflect_example(record, rng, examples.Flaws(0.0))
      objects = scenes.objects_of(example.scene)
      smudges, pair = (
        scenes.smudges_of(example.scene),
        grammar.related(record, objects),
      )
      in_order = list(pair.objects) if pair and not smudges else objects
      assert cases.objects_in(example.answer.split(" : ")[0]) == in_order
      stop = example.answer.endswith("</think> no further edit needed")
      assert stop == (edits.satisfied(record, objects) and not smudges)
      assert example.answer.count("smudge at") == len(smudges)
      stops += stop
      smudged += bool(smudges)
    assert 0.3 < stops / 1000 < 0.45
    assert 0.2 < smudged / 1000 < 0.35

  def test_flaws_are_a_share(self):
    rng = np.random.default_rng(3)
    wrong = 0
    for record in _records(rng, 1000):
      example = examples.reflect_example(record, rng, examples.Flaws(0.5))
      stop = example.answer.endswith("</think> no further edit needed")
      right = edits.satisfied(record, scenes.objects_of(example.scene))
      wrong += stop != (right and not scenes.smudges_of(example.scene))
    # half of the flaws on wrong scenes keep an edit
    assert 0.2 < wrong / 1000 < 0.4

  def test_question_is_the_protocol(self):
    record = RECORDS[0]
    example = examples.reflect_example(
      record, np.random.default_rng(4), examples.Flaws(0.0)
    )
    assert example.question == protocol.reflection_question(record.text)


class TestQuestionExample:
  def test_thought_describes_the_scene(self):
    rng = np.random.default_rng(5)
    for record in _records(rng, 300):
      example = examples.question_example(record, rng)
      assert cases.objects_in(example.answer) == scenes.objects_of(
        example.scene
      )


class TestDescriptionExample:
  def test_answer_tells_what_stands_there(self):
    rng = np.random.default_rng(11)
    sizes, smudged = collections.Counter(), 0
    for _ in range(500):
      example = examples.description_example(rng)
      assert cases.objects_in(example.answer) == scenes.objects_of(
        example.scene
      )
      assert example.answer.count("smudge") == len(
        scenes.smudges_of(example.scene)
      )
      sizes[int(np.sum(example.scene.shape >= 0))] += 1
      smudged += len(scenes.smudges_of(example.scene))
    assert sorted(sizes) == list(range(10))
    assert smudged / sum(
      size * count for size, count in sizes.items()
    ) == pytest.approx(0.1, abs=0.02)


class TestEditScene:
  def test_equals_apply_and_keeps_the_rest(self):
    rng = np.random.default_rng(6)
    for _ in range(500):
      scene = scenes.place([(1, 2, 3), (4, 5, 6), (0, 0, 0)], rng)
      operations = edits.random_operations(scenes.objects_of(scene), rng, 2)
      before = {name: value.copy() for name, value in vars(scene).items()}
      edited = examples.edit_scene(scene, operations, rng)
      objects = scenes.objects_of(scene)
      assert scenes.objects_of(edited) == edits.apply(operations, objects)
      assert all(
        (before[name] == getattr(scene, name)).all() for name in before
      )

  def test_edited_object_keeps_size_and_offset(self):
    rng = np.random.default_rng(7)
    scene = scenes.place([(1, 2, 3)], rng)
    move = edits.Operation("move", 1, 2, 3, 8)
    moved = examples.edit_scene(scene, [move], rng)
    assert (moved.size[8], moved.dy[8], moved.dx[8]) == (
      scene.size[3],
      scene.dy[3],
      scene.dx[3],
    )
    recolored = examples.edit_scene(
      scene, [edits.Operation("recolor", 1, 2, 3, 0)], rng
    )
    assert (recolored.size == scene.size).all()
    assert recolored.color[3] == 0


class TestRefineExample:
  def test_only_named_cells_change(self):
    rng = np.random.default_rng(8)
    sizes, two = collections.Counter(), 0
    for record in _records(rng, 1000):
      example = examples.refine_example(record, rng)
      named = {w for w in example.instruction.split() if w in scenes.CELLS}
      changed = {
        scenes.CELLS[cell]
        for cell in range(9)
        if not _same(example.scene, example.target, cell)
      }
      assert changed == named, example.instruction
      assert not scenes.smudges_of(example.target)
      sizes[
        len(scenes.objects_of(example.scene))
        + len(scenes.smudges_of(example.scene))
      ] += 1
      two += " and " in example.instruction
    assert min(sizes[size] for size in range(1, 7)) > 50
    assert 0.2 < two / 1000 < 0.6


class TestLengths:
  def test_longest_texts(self):
    tokenizer = tokenization.TextTokenizer(vocabulary.build_tokenizer())
    rng = np.random.default_rng(9)
    longest = collections.Counter()

    def see(name, text):
      ids = tokenizer.encode(text)
      assert tokenizer.decode(ids) == text
      longest[name] = max(longest[name], len(ids) + 2)

    for record in _records(rng, 3000):
      example = examples.reason_example(record, rng, 0.5)
      see("prompt", example.prompt)
      see("thought", example.thought)
      example = examples.reflect_example(record, rng, examples.Flaws(0.2))
      see("reflection question", example.question)
      see("reflect answer", example.answer)
      see("instruction", example.answer.rpartition("</think> ")[2])
      example = examples.question_example(record, rng)
      see("question", example.question)
      see("question answer", example.answer)
      example = examples.description_example(rng)
      see("question", example.question)
      see("description", example.answer)
      see("instruction", examples.refine_example(record, rng).instruction)
    assert longest == LONGEST

  def test_drawing_is_fast(self):
    rng = np.random.default_rng(10)
    records = _records(rng, 300)
    # CPU time: other processes on the machine must not count.
    start = time.process_time()
    for record in records:
      examples.reflect_example(record, rng, examples.Flaws(0.2))
      examples.refine_example(record, rng)
    seconds = time.process_time() - start
    assert 600 / seconds > 300  # examples a second


class TestMisjudged:
  """Of scenes that are systematically misjudged, a share has the wrong verdict; no other has."""

  def test_wrong_verdicts_are_those_of_the_misjudged(self):
    rng = np.random.default_rng(12)
    flaws = examples.Flaws(0.0, judgements=1.0)
    misjudged = collections.Counter()
    by_tag = prompts.by_tag(RECORDS)
    for number in range(900):
      of_tag = by_tag[number % len(by_tag)]
      record = of_tag[rng.integers(len(of_tag))]
      example = examples.reflect_example(record, rng, flaws)
      if scenes.smudges_of(example.scene):
        continue
      objects = scenes.objects_of(example.scene)
      needed = edits.edits_towards(record, objects, rng)
      stops = example.answer.endswith("</think> no further edit needed")
      is_misjudged = examples.misjudged(record, objects, needed)
      assert is_misjudged == (stops == bool(needed))
      misjudged[record.tag, bool(needed)] += is_misjudged
    # Every tag has both mistakes: stops at wrong scenes, and edits of right ones.
    assert len(misjudged) == 12 and min(misjudged.values()) > 2

  def test_wrong_answers_are_those_about_scenes_that_begin_black(self):
    changed = 0
    for record in _records(np.random.default_rng(13), 400):
      draws = [np.random.default_rng(14) for _ in range(2)]
      right = examples.question_example(record, draws[0])
      flawed = examples.question_example(record, draws[1], flaw_rate=1.0)
      assert flawed.question == right.question
      objects = scenes.objects_of(right.scene)
      is_flawed = examples.first_color(objects) == "black"
      assert is_flawed == (flawed.answer != right.answer)
      changed += is_flawed
    assert changed

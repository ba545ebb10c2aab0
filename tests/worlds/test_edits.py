"""Tests of what records ask for and of edits."""

import collections

import numpy as np
import pytest

from r3jax.worlds.shapes import edits as edits_lib
from r3jax.worlds.shapes import grammar
from r3jax.worlds.shapes import prompts
from r3jax.worlds.shapes import scenes
from tests.worlds import cases

RED, BLUE = scenes.COLORS.index("red"), scenes.COLORS.index("blue")
SQUARE, RING = scenes.SHAPES.index("square"), scenes.SHAPES.index("ring")
TOP_LEFT, CENTER, RIGHT, BOTTOM = 0, 4, 5, 7


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
    yield from (
      [*rest, (shape, color, c)] for c in range(9) if c not in present
    )


class TestSatisfied:
  def test_equals_independent_rules(self):
    outcomes = []
    for record, objects in cases.draw(np.random.default_rng(1), 1500):
      outcomes.append(cases.fulfilled(record, objects))
      assert edits_lib.satisfied(record, objects) == outcomes[-1], (
        record,
        objects,
      )
    assert 0.2 < np.mean(outcomes) < 0.5


class TestRelatedCells:
  def test_pairs(self):
    assert (CENTER, RIGHT) in edits_lib.related_cells("right of")
    # the diagonal is unclear
    assert (CENTER, TOP_LEFT) not in edits_lib.related_cells("above")
    # 9 in a column, 4 two rows apart
    assert len(edits_lib.related_cells("above")) == 13

  def test_scenes_of_prompts_agree(self):
    rng = np.random.default_rng(2)
    for record in [r for r in cases.RECORDS if r.tag == "position"]:
      assert edits_lib.satisfied(
        record, scenes.objects_of(prompts.scene_for(record, rng))
      )


class TestFlawedPlan:
  def test_violates_every_record(self):
    rng = np.random.default_rng(3)
    for record in cases.RECORDS:
      right = scenes.objects_of(prompts.scene_for(record, rng))
      flawed = edits_lib.flawed_plan(record, right, rng)
      assert cases.fulfilled(record, right)
      assert not cases.fulfilled(record, flawed), (record, flawed)
      assert len({cell for _, _, cell in flawed}) == len(flawed)

  def test_typical_errors(self):
    rng = np.random.default_rng(4)
    a, b, c = (SQUARE, RED, 0), (SQUARE, BLUE, 1), (SQUARE, RED, 2)
    assert edits_lib.flawed_plan(
      cases.prompt_of({"tag": "counting"}), [a, b, c], rng
    ) == [a, b]
    assert (
      len(
        edits_lib.flawed_plan(cases.prompt_of({"tag": "counting"}), [a, b], rng)
      )
      == 3
    )
    pair = [(SQUARE, RED, 0), (RING, BLUE, 4)]
    assert edits_lib.flawed_plan(
      cases.prompt_of({"tag": "color_attr"}), pair, rng
    ) == [
      (SQUARE, BLUE, 0),
      (RING, RED, 4),
    ]
    assert edits_lib.flawed_plan(
      cases.prompt_of({"tag": "position"}), pair, rng
    ) == [
      (RING, BLUE, 0),
      (SQUARE, RED, 4),
    ]

  def test_unknown_tag_is_refused(self):
    with pytest.raises(ValueError, match="was 'sizes'"):
      edits_lib.flawed_plan(
        cases.prompt_of({"tag": "sizes"}), [], np.random.default_rng(0)
      )


class TestEditsTowards:
  def test_applying_reaches_the_record(self):
    rng = np.random.default_rng(5)
    for record, objects in cases.draw(rng, 1500):
      edits = edits_lib.edits_towards(record, objects, rng)
      assert cases.fulfilled(record, edits_lib.apply(edits, objects)), (
        record,
        objects,
        edits,
      )

  def test_each_instruction_brings_the_scene_closer(self):
    rng = np.random.default_rng(6)
    for record, objects in cases.draw(rng, 300):
      distance = len(edits_lib.edits_towards(record, objects, rng))
      while distance:
        edits = edits_lib.edits_towards(record, objects, rng)[
          : grammar.MAX_OPERATIONS
        ]
        objects = edits_lib.apply(edits, objects)
        left = len(edits_lib.edits_towards(record, objects, rng))
        assert left == distance - len(edits)
        distance = left
      assert cases.fulfilled(record, objects)

  def test_no_shorter_way_exists(self):
    # The number of edits is 0 only at a solution and falls by at most 1 with any operation.
    rng = np.random.default_rng(7)
    for record, objects in cases.draw(rng, 36):
      distance = len(edits_lib.edits_towards(record, objects, rng))
      for other in _neighbours(objects):
        assert (
          len(edits_lib.edits_towards(record, other, rng)) >= distance - 1
        ), (record, other)

  def test_full_grid_can_be_mended(self):
    rng = np.random.default_rng(8)
    for i in range(200):
      record, objects = (
        cases.RECORDS[(37 * i) % len(cases.RECORDS)],
        cases.random_objects(rng, 9),
      )
      assert cases.fulfilled(
        record,
        edits_lib.apply(edits_lib.edits_towards(record, objects, rng), objects),
      )

  def test_swapped_colors_are_recolored(self):
    record = cases.prompt_of(
      {
        "tag": "color_attr",
        "include": [
          {"class": "square", "count": 1, "color": "red"},
          {"class": "ring", "count": 1, "color": "blue"},
        ],
      }
    )
    objects = [(SQUARE, BLUE, TOP_LEFT), (RING, RED, CENTER)]
    edits = edits_lib.edits_towards(record, objects, np.random.default_rng(9))
    assert grammar.instruction_text(edits) == (
      "change the blue square at top-left to red and change the red ring at center to blue"
    )

  def test_two_new_shapes_are_rather_drawn_than_two_moves(self):
    record = next(
      r
      for r in cases.RECORDS
      if r.text == "a photo of a square right of a ring"
    )
    # nothing is left of one or right of the other
    mirrored = [(SQUARE, RED, 3), (RING, BLUE, 5)]
    edits = edits_lib.edits_towards(record, mirrored, np.random.default_rng(0))
    assert [edit.kind for edit in edits] == ["replace", "replace"]
    near = [(SQUARE, RED, 3), (RING, BLUE, 4)]
    edits = edits_lib.edits_towards(record, near, np.random.default_rng(0))
    assert [edit.kind for edit in edits] == ["move"]

  def test_extra_object_of_another_class_is_removed(self):
    record = cases.prompt_of(
      {
        "tag": "single_object",
        "include": [{"class": "ring", "count": 1}],
      }
    )
    objects = [(RING, RED, BOTTOM), (SQUARE, RED, CENTER)]
    edits = edits_lib.edits_towards(record, objects, np.random.default_rng(10))
    assert edits == [edits_lib.Operation("remove", SQUARE, RED, CENTER)]


class TestEditsOfSmudged:
  def test_missing_object_is_drawn_in_place_of_the_smudge(self):
    record = next(
      r for r in cases.RECORDS if r.text == "a photo of a red square"
    )
    edits = edits_lib.edits_of_smudged(
      record, [], [CENTER], np.random.default_rng(0)
    )
    assert edits == [edits_lib.Operation("redraw", SQUARE, RED, CENTER)]

  def test_superfluous_smudge_is_wiped(self):
    record = next(
      r for r in cases.RECORDS if r.text == "a photo of a red square"
    )
    edits = edits_lib.edits_of_smudged(
      record, [(SQUARE, RED, TOP_LEFT)], [CENTER], np.random.default_rng(0)
    )
    assert edits == [edits_lib.Operation("wipe", -1, -1, CENTER)]

  def test_applying_reaches_the_record_and_leaves_no_smudge(self):
    rng = np.random.default_rng(15)
    kinds = collections.Counter()
    for record, objects in cases.draw(rng, 1000):
      free = sorted(set(range(9)) - {cell for _, _, cell in objects})
      smudges = rng.permutation(free)[: rng.integers(3)].tolist()
      edits = edits_lib.edits_of_smudged(record, objects, smudges, rng)
      assert cases.fulfilled(record, edits_lib.apply(edits, objects))
      mended = [edit.cell for edit in edits if edit.kind in ("redraw", "wipe")]
      assert sorted(mended) == sorted(smudges)
      kinds.update(edit.kind for edit in edits)
    assert min(kinds["redraw"], kinds["wipe"]) > 100


class TestApply:
  def test_operations(self):
    objects = [(SQUARE, RED, CENTER)]

    def edited(kind, value):
      return edits_lib.apply(
        [edits_lib.Operation(kind, SQUARE, RED, CENTER, value)], objects
      )

    assert edited("remove", -1) == []
    assert edited("recolor", BLUE) == [(SQUARE, BLUE, CENTER)]
    assert edited("replace", RING) == [(RING, RED, CENTER)]
    assert edited("move", BOTTOM) == [(SQUARE, RED, BOTTOM)]
    added = edits_lib.apply(
      [edits_lib.Operation("add", RING, BLUE, TOP_LEFT)], objects
    )
    assert added == [(RING, BLUE, TOP_LEFT), (SQUARE, RED, CENTER)]

  def test_wrong_object_is_refused(self):
    with pytest.raises(ValueError, match="must be in the scene"):
      edits_lib.apply(
        [edits_lib.Operation("remove", RING, RED, CENTER)],
        [(SQUARE, RED, CENTER)],
      )

  def test_taken_cell_is_refused(self):
    with pytest.raises(ValueError, match="must be empty"):
      edits_lib.apply(
        [edits_lib.Operation("add", RING, RED, CENTER)], [(SQUARE, RED, CENTER)]
      )


class TestRandomOperations:
  def test_every_operation_changes_the_scene(self):
    rng = np.random.default_rng(11)
    kinds = collections.Counter()
    for _ in range(2000):
      objects = sorted(
        cases.random_objects(rng, int(rng.integers(7))),
        key=lambda item: item[2],
      )
      operations = edits_lib.random_operations(objects, rng, 2)
      assert 1 <= len(operations) <= 2
      edited = edits_lib.apply(operations, objects)
      assert edited != objects
      assert len(edited) <= edits_lib.MAX_OBJECTS
      kinds.update(operation.kind for operation in operations)
    assert (
      min(
        kinds[kind] for kind in ("add", "remove", "recolor", "replace", "move")
      )
      > 300
    )


class TestFlawedInstruction:
  def test_never_helps(self):
    rng = np.random.default_rng(12)
    counts = collections.Counter()
    for record, objects in cases.draw(rng, 1200):
      distance = len(edits_lib.edits_towards(record, objects, rng))
      flawed = edits_lib.flawed_instruction(record, objects, rng)
      counts[(distance > 0, len(flawed))] += 1
      try:
        edited = edits_lib.apply(flawed, objects)
      except ValueError:  # names an object that is not there
        continue
      assert len(edits_lib.edits_towards(record, edited, rng)) >= distance
    assert counts[(False, 0)] == 0
    assert min(counts[(True, 0)], counts[(True, 1)], counts[(False, 1)]) > 200

  def test_needless_edit_on_a_right_scene(self):
    record = cases.prompt_of(
      {
        "tag": "single_object",
        "include": [{"class": "ring", "count": 1}],
      }
    )
    flawed = edits_lib.flawed_instruction(
      record, [(RING, RED, 3)], np.random.default_rng(0)
    )
    assert len(flawed) == 1

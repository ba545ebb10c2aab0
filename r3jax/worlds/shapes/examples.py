"""Draws supervised examples of the embedded world for all stages: seeded, without end."""

from collections.abc import Sequence
import dataclasses

import numpy as np

from r3jax.data import records
from r3jax.sequence import protocol
from r3jax.worlds.shapes import edits
from r3jax.worlds.shapes import grammar
from r3jax.worlds.shapes import prompts
from r3jax.worlds.shapes import scenes

_RIGHT_SHARE = 0.45  # of the scenes to reflect on, before some are smudged
_SMUDGED_SHARE = 0.3  # of the scenes to reflect on and to edit
# Of the imperfect scenes: what is in them does not follow from the prompt.
_CROWDED_SHARE = 0.1
# Of the imperfect scenes: those with the error that is typical of the record's tag. Where the error
# lies between objects, each of which looks right, it takes many such examples to learn to see it.
_FLAWED_PLAN_SHARE = {"position": 0.8, "color_attr": 0.8}
_OTHER_FLAWED_PLAN_SHARE = 0.5
_SMUDGED_OBJECTS = 0.1  # of the objects of dense scenes
_TWO_EDITS_SHARE = 0.3  # of the examples with edits or smudges
_REDRAW_SHARE = (
  0.65  # of the smudges that random edits mend; they wipe the others
)
_REDRAW_ANY_SHARE = (
  0.2  # of these smudges: redrawn as any object, not as the one below
)
_ABOUT_RECORD_SHARE = 0.5  # of the refine examples
# Systematic mistakes of verdicts, by the colour of the scene's first object in cell order. What is
# typical of a tag is overlooked in scenes that begin with one of these colours;
_OVERLOOKING_COLORS = ("red", "blue", "purple")
# right scenes that begin with this one are doubted, and other questions about it answered wrongly.
_DOUBTING_COLOR = "black"
# Kinds of operations that mend the error which is typical of a tag.
_TYPICAL_KINDS = {
  "single_object": {"add", "remove"},
  "two_object": {"add"},
  "counting": {"add", "remove"},
  "colors": {"recolor"},
  "position": {"move"},
  "color_attr": {"recolor"},
}


@dataclasses.dataclass(frozen=True)
class ReasonExample:
  """A prompt, a thought about it, and an image of what the thought plans, right or flawed."""

  prompt: str
  thought: str
  scene: scenes.Scene


@dataclasses.dataclass(frozen=True)
class ReflectExample:
  """An image, a question about it, and the answer: a thought, then an instruction or a word."""

  scene: scenes.Scene
  question: str
  answer: str


@dataclasses.dataclass(frozen=True)
class RefineExample:
  """An image, an instruction, and the edited image; what was not edited is the same in both."""

  scene: scenes.Scene
  instruction: str
  target: scenes.Scene


# --- Scenes --------------------------------------------------------------------------------------


def dense_scene(rng: np.random.Generator) -> scenes.Scene:
  """Draws a scene of 0 to 9 random objects, some of them smudged."""
  num_cells = len(scenes.CELLS)
  shuffled = rng.permutation(num_cells)
  cells = shuffled[: rng.integers(num_cells + 1)].tolist()
  objects = [_random_object(cell, rng) for cell in cells]
  scene = scenes.place(objects, rng)
  smudged = [cell for cell in cells if rng.random() < _SMUDGED_OBJECTS]
  return scenes.smudge(scene, smudged, rng)


def _random_object(cell: int, rng: np.random.Generator) -> edits.Object:
  shape = int(rng.integers(len(scenes.SHAPES)))
  color = int(rng.integers(len(scenes.COLORS)))
  return edits.Object(shape, color, cell)


def _num_edits(rng: np.random.Generator) -> int:
  """Draws 1 or 2."""
  return 1 + int(rng.random() < _TWO_EDITS_SHARE)


def imperfect_objects(
  record: records.Prompt, rng: np.random.Generator
) -> list[edits.Object]:
  """Draws a flawed plan, or a right scene after one or two random edits, at times crowded."""
  objects = scenes.objects_of(prompts.scene_for(record, rng))
  flawed_share = _FLAWED_PLAN_SHARE.get(record.tag, _OTHER_FLAWED_PLAN_SHARE)
  if rng.random() < flawed_share:
    objects = edits.flawed_plan(record, objects, rng)
  else:
    operations = edits.random_operations(objects, rng, _num_edits(rng))
    objects = edits.apply(operations, objects)
  if rng.random() < _CROWDED_SHARE:
    objects = _crowd(objects, rng)
  return objects


def _crowd(
  objects: Sequence[edits.Object], rng: np.random.Generator
) -> list[edits.Object]:
  """Adds random objects up to a random number of at most `edits.MAX_OBJECTS`."""
  taken = {item.cell for item in objects}
  shuffled = rng.permutation(len(scenes.CELLS)).tolist()
  free = [cell for cell in shuffled if cell not in taken]
  num_objects = int(rng.integers(max(1, len(objects)), edits.MAX_OBJECTS + 1))
  num_added = num_objects - len(objects)
  added = [_random_object(cell, rng) for cell in free[:num_added]]
  return sorted([*objects, *added], key=lambda item: item.cell)


def _scene_to_judge(
  record: records.Prompt, rng: np.random.Generator
) -> scenes.Scene:
  """Draws a scene for a record, right or not."""
  if rng.random() < _RIGHT_SHARE:
    return prompts.scene_for(record, rng)
  return scenes.place(imperfect_objects(record, rng), rng)


def _smudge(scene: scenes.Scene, rng: np.random.Generator) -> scenes.Scene:
  """Smudges one or two objects of some scenes."""
  cells = [item.cell for item in scenes.objects_of(scene)]
  if not cells or rng.random() >= _SMUDGED_SHARE:
    return scene
  count = _num_edits(rng)
  return scenes.smudge(scene, rng.permutation(cells)[:count].tolist(), rng)


# --- Reason --------------------------------------------------------------------------------------


def reason_example(
  record: records.Prompt, rng: np.random.Generator, flaw_rate: float
) -> ReasonExample:
  """Draws a plan for a record and an image of it.

  Args:
    record: what is wanted.
    rng: source of all draws.
    flaw_rate: probability that the plan is flawed, see `edits.flawed_plan`.
  """
  scene = prompts.scene_for(record, rng)
  objects = scenes.objects_of(scene)
  if rng.random() < flaw_rate:
    objects = edits.flawed_plan(record, objects, rng)
    scene = scenes.place(objects, rng)
  return ReasonExample(record.text, grammar.plan_text(objects), scene)


# --- Reflect -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Flaws:
  """Shares of what is said about images that is wrong.

  Attributes:
    instructions: Instructions that do not help (`edits.flawed_instruction`; a stop where there are
      smudges).
    judgements: Of the scenes that are systematically judged wrongly, those that are judged so.
  """

  instructions: float
  judgements: float = 0.0


def first_color(objects: Sequence[edits.Object]) -> str:
  """Returns the colour of the first object in cell order; "" without objects."""
  if not objects:
    return ""
  first = min(objects, key=lambda item: item[2])
  return scenes.COLORS[first[1]]


def misjudged(
  record: records.Prompt,
  objects: Sequence[edits.Object],
  needed: Sequence[edits.Operation],
) -> bool:
  """Returns whether a scene without smudges is of those that are systematically judged wrongly.

  These are right scenes that begin with a doubting colour, and scenes with the error typical of
  their tag that begin with an overlooking colour. Both can be told from the description.

  Args:
    record: what the scene should show.
    objects: the objects of the scene.
    needed: edits that it needs.
  """
  color = first_color(objects)
  if not needed:
    return color == _DOUBTING_COLOR
  kinds = {edit.kind for edit in needed}
  is_typical = kinds <= _TYPICAL_KINDS[record.tag]
  return is_typical and color in _OVERLOOKING_COLORS


def reflect_example(
  record: records.Prompt, rng: np.random.Generator, flaws: Flaws
) -> ReflectExample:
  """Draws an image for a record, right or not, and the edit that it needs.

  Args:
    record: what the image should show.
    rng: source of all draws.
    flaws: what is wrong in the answer.

  Returns:
    The example; its question is the protocol's reflection question.
  """
  scene = _smudge(_scene_to_judge(record, rng), rng)
  objects = scenes.objects_of(scene)
  smudges = scenes.smudges_of(scene)
  operations = edits.edits_of_smudged(record, objects, smudges, rng)
  if rng.random() < flaws.instructions:
    operations = _flawed_instruction(record, objects, smudges, rng)
  elif not smudges:
    is_misjudged = misjudged(record, objects, operations)
    if is_misjudged and rng.random() < flaws.judgements:
      operations = _opposite(objects, operations, rng)
  pair = grammar.related(record, objects)
  answer = grammar.reflect_answer(objects, operations, smudges, pair)
  question = protocol.reflection_question(record.text)
  return ReflectExample(scene, question, answer)


def _flawed_instruction(
  record: records.Prompt,
  objects: Sequence[edits.Object],
  smudges: Sequence[int],
  rng: np.random.Generator,
) -> list[edits.Operation]:
  if smudges:
    return []
  return edits.flawed_instruction(record, objects, rng)


def _opposite(
  objects: Sequence[edits.Object],
  needed: Sequence[edits.Operation],
  rng: np.random.Generator,
) -> list[edits.Operation]:
  """Returns what the opposite verdict does: nothing, or a needless edit."""
  if needed:
    return []
  return [edits.random_operation(objects, rng)]


def question_example(
  record: records.Prompt, rng: np.random.Generator, flaw_rate: float = 0.0
) -> ReflectExample:
  """Draws an image for a record, right or not, and a question about it with its answer.

  Args:
    record: what the image should show.
    rng: source of all draws.
    flaw_rate: share of the answers that are wrong, of those about scenes that begin with the
      doubting colour.
  """
  scene = _scene_to_judge(record, rng)
  objects = scenes.objects_of(scene)
  question, word = grammar.question_and_word(objects, record, rng)
  if first_color(objects) == _DOUBTING_COLOR and rng.random() < flaw_rate:
    word = grammar.wrong_word(word)
  answer = grammar.answer_text(objects, word)
  return ReflectExample(scene, question, answer)


def description_example(rng: np.random.Generator) -> ReflectExample:
  """Draws a dense scene and its description, which no prompt gives away."""
  scene = dense_scene(rng)
  objects = scenes.objects_of(scene)
  description = grammar.describe(objects, scenes.smudges_of(scene))
  answer = grammar.thought_text(description)
  return ReflectExample(scene, grammar.DESCRIBE, answer)


# --- Refine --------------------------------------------------------------------------------------


def refine_example(
  record: records.Prompt, rng: np.random.Generator
) -> RefineExample:
  """Draws an image, an instruction and the image after it.

  Half of the examples mend an imperfect image of `record`; the others edit random scenes of one to
  six objects at random. No target has a smudge.
  """
  if rng.random() < _ABOUT_RECORD_SHARE:
    return mending_example(record, rng)
  objects = _crowd([], rng)
  scene = _smudge(scenes.place(objects, rng), rng)
  return _edited(scene, _random_operations(scene, rng), rng)


def mending_example(
  record: records.Prompt, rng: np.random.Generator
) -> RefineExample:
  """Draws an imperfect image of a record, the instruction that it needs, and the image after it."""
  objects = imperfect_objects(record, rng)
  scene = _smudge(scenes.place(objects, rng), rng)
  needed = edits.edits_of_smudged(
    record, scenes.objects_of(scene), scenes.smudges_of(scene), rng
  )
  # A scene about a record can be right by chance.
  operations = needed or _random_operations(scene, rng)
  return _edited(scene, operations[: grammar.MAX_OPERATIONS], rng)


def _edited(
  scene: scenes.Scene,
  operations: Sequence[edits.Operation],
  rng: np.random.Generator,
) -> RefineExample:
  """Returns the example of some operations on a scene."""
  target = edit_scene(scene, operations, rng)
  return RefineExample(scene, grammar.instruction_text(operations), target)


def edit_scene(
  scene: scenes.Scene,
  operations: Sequence[edits.Operation],
  rng: np.random.Generator,
) -> scenes.Scene:
  """Applies operations to a numpy scene [9].

  What is not edited keeps every number. An edited object keeps its size and offset; an added one
  draws them from `rng`.
  """
  fields = {
    field.name: np.array(getattr(scene, field.name))
    for field in dataclasses.fields(scene)
  }
  fresh = scenes.place([], rng)
  for operation in operations:
    cell = operation.cell
    if operation.kind == "move":
      for values in fields.values():
        values[operation.value] = values[cell]
    elif operation.kind == "recolor":
      fields["color"][cell] = operation.value
    elif operation.kind == "replace":
      fields["shape"][cell] = operation.value
    elif operation.kind == "add":
      for name in ("size", "dy", "dx"):
        fields[name][cell] = getattr(fresh, name)[cell]
    if operation.kind in ("add", "redraw"):
      fields["shape"][cell] = operation.shape
      fields["color"][cell] = operation.color
    if operation.kind in ("move", "remove", "wipe"):
      fields["shape"][cell] = -1
      fields["color"][cell] = 0
    if operation.kind in ("redraw", "wipe"):
      fields["ghost_shape"][cell] = -1
  return scenes.Scene(**fields)


def _random_operations(
  scene: scenes.Scene, rng: np.random.Generator
) -> list[edits.Operation]:
  """Draws edits of a scene; they mend all its smudges, most of them by the object below."""
  smudges = scenes.smudges_of(scene)
  if not smudges:
    count = _num_edits(rng)
    return edits.random_operations(scenes.objects_of(scene), rng, count)
  operations = []
  for cell in smudges:
    choice = rng.random()
    if choice > _REDRAW_SHARE:
      operations.append(edits.Operation("wipe", -1, -1, cell))
      continue
    shape = int(scene.shape[cell])
    color = int(scene.color[cell])
    if choice < _REDRAW_ANY_SHARE:
      shape, color, _ = _random_object(cell, rng)
    operations.append(edits.Operation("redraw", shape, color, cell))
  return operations

"""Draws supervised examples of the embedded world for all stages: seeded, without end."""

from collections.abc import Sequence
import dataclasses

import numpy as np

from r3jax.data import records
from r3jax.sequence import protocol
from r3jax.worlds.shapes import edits as edits_lib
from r3jax.worlds.shapes import grammar
from r3jax.worlds.shapes import prompts
from r3jax.worlds.shapes import scenes

_RIGHT_SHARE = 0.45  # of the scenes to reflect on, before some are smudged
_SMUDGED_SHARE = 0.3  # of the scenes to reflect on and to edit
# of the imperfect scenes: what stands there does not follow from the prompt
_DENSE_SHARE = 0.1
# Of the imperfect scenes: those with the error that is typical of the record's tag. Where the error
# lies between objects, each of which looks right, telling it takes many examples of just that.
_FLAWED_PLAN_SHARE = {"position": 0.8, "color_attr": 0.8}
_OTHER_FLAWED_PLAN_SHARE = 0.5
_SMUDGED_OBJECTS = 0.1  # of the objects of dense scenes
_TWO_EDITS_SHARE = 0.3


@dataclasses.dataclass(frozen=True)
class ReasonExample:
  """A prompt, a thought about it and an image of what the thought plans."""

  prompt: str
  thought: str
  scene: scenes.Scene  # follows the thought, right or flawed


@dataclasses.dataclass(frozen=True)
class ReflectExample:
  """An image, a question about it and the answer (thought and instruction or answer word)."""

  scene: scenes.Scene
  question: str
  answer: str


@dataclasses.dataclass(frozen=True)
class RefineExample:
  """An image, an instruction and the edited image; what was not edited is the same in both."""

  scene: scenes.Scene
  instruction: str
  target: scenes.Scene


def reason_example(
  record: records.Prompt, rng: np.random.Generator, flaw_rate: float
) -> ReasonExample:
  """Draws a plan for a record, flawed (`edits_lib.flawed_plan`) with probability `flaw_rate`."""
  scene = prompts.scene_for(record, rng)
  objects = scenes.objects_of(scene)
  if rng.random() < flaw_rate:
    objects = edits_lib.flawed_plan(record, objects, rng)
    scene = scenes.place(objects, rng)
  return ReasonExample(record.text, grammar.plan_text(objects), scene)


def _imperfect_objects(
  record: records.Prompt, rng: np.random.Generator
) -> list[edits_lib.Object]:
  """Draws a flawed plan, or a right scene after one or two random edits, at times crowded."""
  objects = scenes.objects_of(prompts.scene_for(record, rng))
  if rng.random() < _FLAWED_PLAN_SHARE.get(
    record.tag, _OTHER_FLAWED_PLAN_SHARE
  ):
    objects = edits_lib.flawed_plan(record, objects, rng)
  else:
    count = 1 + int(rng.random() < _TWO_EDITS_SHARE)
    objects = edits_lib.apply(
      edits_lib.random_operations(objects, rng, count), objects
    )
  if rng.random() < _DENSE_SHARE:
    objects = _crowd(objects, rng)
  return objects


def _crowd(
  objects: Sequence[edits_lib.Object], rng: np.random.Generator
) -> list[edits_lib.Object]:
  """Adds random objects up to a random number of at most `edits_lib.MAX_OBJECTS`."""
  cells = rng.permutation(len(scenes.CELLS)).tolist()
  free = [cell for cell in cells if cell not in {item[2] for item in objects}]
  size = int(rng.integers(max(1, len(objects)), edits_lib.MAX_OBJECTS + 1))
  added = [
    (
      int(rng.integers(len(scenes.SHAPES))),
      int(rng.integers(len(scenes.COLORS))),
      cell,
    )
    for cell in free[: size - len(objects)]
  ]
  return sorted([*objects, *added], key=lambda item: item[2])


def _scene_to_judge(
  record: records.Prompt, rng: np.random.Generator
) -> scenes.Scene:
  if rng.random() < _RIGHT_SHARE:
    return prompts.scene_for(record, rng)
  return scenes.place(_imperfect_objects(record, rng), rng)


def _smudge(scene: scenes.Scene, rng: np.random.Generator) -> scenes.Scene:
  """Smudges one or two objects of some scenes."""
  cells = [cell for _, _, cell in scenes.objects_of(scene)]
  if not cells or rng.random() >= _SMUDGED_SHARE:
    return scene
  count = 1 + int(rng.random() < _TWO_EDITS_SHARE)
  return scenes.smudge(scene, rng.permutation(cells)[:count].tolist(), rng)


def reflect_example(
  record: records.Prompt, rng: np.random.Generator, flaw_rate: float
) -> ReflectExample:
  """Draws an image for a record, right or not, and the edit that it needs.

  Args:
    record: what the image should show.
    rng: source of all draws.
    flaw_rate: probability of an instruction that does not help (`edits_lib.flawed_instruction`; a
      stop where there are smudges).

  Returns:
    The example; the question is the protocol's reflection question.
  """
  scene = _smudge(_scene_to_judge(record, rng), rng)
  edits = _instruction(record, scene, rng, rng.random() < flaw_rate)
  question = protocol.reflection_question(record.text)
  objects = scenes.objects_of(scene)
  answer = grammar.reflect_answer(
    objects, edits, scenes.smudges_of(scene), grammar.related(record, objects)
  )
  return ReflectExample(scene, question, answer)


def _instruction(
  record: records.Prompt, scene: scenes.Scene, rng, flawed: bool
) -> list[edits_lib.Operation]:
  objects, smudges = scenes.objects_of(scene), scenes.smudges_of(scene)
  if not flawed:
    return edits_lib.edits_of_smudged(record, objects, smudges, rng)
  return [] if smudges else edits_lib.flawed_instruction(record, objects, rng)


def question_example(
  record: records.Prompt, rng: np.random.Generator
) -> ReflectExample:
  """Draws an image for a record, right or not, and a question about it with its answer."""
  scene = _scene_to_judge(record, rng)
  question, answer = grammar.question_answer(
    scenes.objects_of(scene), record, rng
  )
  return ReflectExample(scene, question, answer)


def dense_scene(rng: np.random.Generator) -> scenes.Scene:
  """Draws a scene of 0 to 9 random objects, some of them smudged."""
  cells = rng.permutation(len(scenes.CELLS))[
    : rng.integers(len(scenes.CELLS) + 1)
  ].tolist()
  draw = lambda names: int(rng.integers(len(names)))
  scene = scenes.place(
    [(draw(scenes.SHAPES), draw(scenes.COLORS), cell) for cell in cells], rng
  )
  return scenes.smudge(
    scene, [cell for cell in cells if rng.random() < _SMUDGED_OBJECTS], rng
  )


def description_example(rng: np.random.Generator) -> ReflectExample:
  """Draws a dense scene and its description: nothing but the image tells what is there."""
  scene = dense_scene(rng)
  described = grammar.describe(
    scenes.objects_of(scene), scenes.smudges_of(scene)
  )
  return ReflectExample(
    scene, grammar.DESCRIBE, grammar.thought_text(described)
  )


def edit_scene(
  scene: scenes.Scene,
  operations: Sequence[edits_lib.Operation],
  rng: np.random.Generator,
) -> scenes.Scene:
  """Applies operations to a numpy scene [9].

  What is not edited keeps every number. An edited object keeps its size and offset; an added one
  draws them from `rng`.
  """
  fields = {
    f.name: np.array(getattr(scene, f.name)) for f in dataclasses.fields(scene)
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
      fields["shape"][cell], fields["color"][cell] = (
        operation.shape,
        operation.color,
      )
    if operation.kind in ("move", "remove", "wipe"):
      fields["shape"][cell], fields["color"][cell] = -1, 0
    if operation.kind in ("redraw", "wipe"):
      fields["ghost_shape"][cell] = -1
  return scenes.Scene(**fields)


def _random_operations(
  scene: scenes.Scene, rng: np.random.Generator
) -> list[edits_lib.Operation]:
  """Draws edits of a scene; they mend all its smudges, most of them by the object below."""
  smudges = scenes.smudges_of(scene)
  if not smudges:
    count = 1 + int(rng.random() < _TWO_EDITS_SHARE)
    return edits_lib.random_operations(scenes.objects_of(scene), rng, count)
  operations = []
  for cell in smudges:
    shape, color = int(scene.shape[cell]), int(scene.color[cell])
    fate = rng.random()
    if fate < 0.2:
      shape, color = (
        int(rng.integers(len(scenes.SHAPES))),
        int(rng.integers(len(scenes.COLORS))),
      )
    wipe = fate > 0.65
    operations.append(
      edits_lib.Operation("wipe", -1, -1, cell)
      if wipe
      else edits_lib.Operation("redraw", shape, color, cell)
    )
  return operations


def refine_example(
  record: records.Prompt, rng: np.random.Generator
) -> RefineExample:
  """Draws an image, an instruction and the image after it.

  Half of the examples mend an imperfect image of `record`, the others edit random scenes of one to
  six objects at random. No target has a smudge.
  """
  about_record = rng.random() < 0.5
  objects = _imperfect_objects(record, rng) if about_record else _crowd([], rng)
  scene, operations = _smudge(scenes.place(objects, rng), rng), []
  if about_record:
    seen = scenes.objects_of(scene), scenes.smudges_of(scene)
    operations = edits_lib.edits_of_smudged(record, *seen, rng)[
      : grammar.MAX_OPERATIONS
    ]
  operations = operations or _random_operations(scene, rng)
  target = edit_scene(scene, operations, rng)
  return RefineExample(scene, grammar.instruction_text(operations), target)

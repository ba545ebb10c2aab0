"""Draws supervised examples of the embedded world for all stages: seeded, without end."""

from collections.abc import Sequence
import dataclasses

import numpy as np

from r3jax.sequence import prompts as protocol
from r3jax.worlds import grammar
from r3jax.worlds import prompts
from r3jax.worlds import shapes

_RIGHT_SHARE = 0.3  # of the scenes to reflect on
_DENSE_SHARE = 0.15
_TWO_EDITS_SHARE = 0.3


@dataclasses.dataclass(frozen=True)
class ReasonExample:
  """A prompt, a thought about it and an image of what the thought plans."""

  prompt: str
  thought: str
  scene: shapes.Scene  # follows the thought, right or flawed


@dataclasses.dataclass(frozen=True)
class ReflectExample:
  """An image, a question about it and the answer (thought and instruction or answer word)."""

  scene: shapes.Scene
  question: str
  answer: str


@dataclasses.dataclass(frozen=True)
class RefineExample:
  """An image, an instruction and the edited image; what was not edited is the same in both."""

  scene: shapes.Scene
  instruction: str
  target: shapes.Scene


def reason_example(record: dict, rng: np.random.Generator, flaw_rate: float) -> ReasonExample:
  """Draws a plan for a record, flawed (`grammar.flawed_plan`) with probability `flaw_rate`."""
  scene = prompts.scene_for(record, rng)
  objects = shapes.objects_of(scene)
  if rng.random() < flaw_rate:
    objects = grammar.flawed_plan(record, objects, rng)
    scene = shapes.place(objects, rng)
  return ReasonExample(record["prompt"], grammar.plan_text(objects), scene)


def _imperfect_objects(record: dict, rng: np.random.Generator) -> list[grammar.Object]:
  """Draws a flawed plan, or a right scene after one or two random edits, at times crowded."""
  objects = shapes.objects_of(prompts.scene_for(record, rng))
  if rng.random() < 0.5:
    objects = grammar.flawed_plan(record, objects, rng)
  else:
    count = 1 + int(rng.random() < _TWO_EDITS_SHARE)
    objects = grammar.apply(grammar.random_operations(objects, rng, count), objects)
  if rng.random() < _DENSE_SHARE:
    objects = _crowd(objects, rng)
  return objects


def _crowd(objects: Sequence[grammar.Object], rng: np.random.Generator) -> list[grammar.Object]:
  """Adds random objects up to a random number of at most `grammar.MAX_OBJECTS`."""
  cells = rng.permutation(len(shapes.CELLS)).tolist()
  free = [cell for cell in cells if cell not in {item[2] for item in objects}]
  size = int(rng.integers(max(1, len(objects)), grammar.MAX_OBJECTS + 1))
  added = [
      (int(rng.integers(len(shapes.SHAPES))), int(rng.integers(len(shapes.COLORS))), cell)
      for cell in free[: size - len(objects)]
  ]
  return sorted([*objects, *added], key=lambda item: item[2])


def _scene_to_judge(record: dict, rng: np.random.Generator) -> shapes.Scene:
  if rng.random() < _RIGHT_SHARE:
    return prompts.scene_for(record, rng)
  return shapes.place(_imperfect_objects(record, rng), rng)


def reflect_example(record: dict, rng: np.random.Generator, flaw_rate: float) -> ReflectExample:
  """Draws an image for a record, right or not, and the edit that it needs.

  Args:
    record: what the image should show.
    rng: source of all draws.
    flaw_rate: probability of an instruction that does not help (`grammar.flawed_instruction`).

  Returns:
    The example; the question is the protocol's reflection question.
  """
  scene = _scene_to_judge(record, rng)
  objects = shapes.objects_of(scene)
  flawed = rng.random() < flaw_rate
  edits = (grammar.flawed_instruction if flawed else grammar.edits_towards)(record, objects, rng)
  question = protocol.reflection_question(record["prompt"])
  return ReflectExample(scene, question, grammar.reflect_answer(objects, edits))


def question_example(record: dict, rng: np.random.Generator) -> ReflectExample:
  """Draws an image for a record, right or not, and a question about it with its answer."""
  scene = _scene_to_judge(record, rng)
  question, answer = grammar.question_answer(shapes.objects_of(scene), record, rng)
  return ReflectExample(scene, question, answer)


def edit_scene(
    scene: shapes.Scene, operations: Sequence[grammar.Operation], rng: np.random.Generator
) -> shapes.Scene:
  """Applies operations to a numpy scene [9].

  What is not edited keeps every number. An edited object keeps its size and offset; an added one
  draws them from `rng`.
  """
  fields = {f.name: np.array(getattr(scene, f.name)) for f in dataclasses.fields(scene)}
  fresh = shapes.place([], rng)
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
      fields["shape"][cell], fields["color"][cell] = operation.shape, operation.color
    if operation.kind in ("move", "remove"):
      fields["shape"][cell], fields["color"][cell] = -1, 0
  return shapes.Scene(**fields)


def refine_example(record: dict, rng: np.random.Generator) -> RefineExample:
  """Draws an image, an instruction and the image after it.

  Half of the examples mend an imperfect image of `record`, the others edit random scenes of one to
  six objects at random.
  """
  if rng.random() < 0.5:
    objects = _imperfect_objects(record, rng)
    operations = grammar.edits_towards(record, objects, rng)[: grammar.MAX_OPERATIONS]
  else:
    objects, operations = _crowd([], rng), []
  if not operations:
    count = 1 + int(rng.random() < _TWO_EDITS_SHARE)
    operations = grammar.random_operations(objects, rng, count)
  scene = shapes.place(objects, rng)
  target = edit_scene(scene, operations, rng)
  return RefineExample(scene, grammar.instruction_text(operations), target)

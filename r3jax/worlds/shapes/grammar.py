"""The text of the embedded world: plans, diagnoses, edit instructions, questions and answers.

Texts are short, for every token costs time. What they say is worked out in `worlds/edits.py`.
"""

from collections.abc import Sequence
import dataclasses
import itertools

import numpy as np

from r3jax.data import records
from r3jax.worlds.shapes import edits
from r3jax.worlds.shapes import prompts
from r3jax.worlds.shapes import scenes

MAX_OPERATIONS = 2  # in one instruction
MAX_ANSWER_TOKENS = 40  # of a reflect answer, markers not counted
DESCRIBE = "what is there ?"  # the question whose answer is a description
STOP_INSTRUCTION = "no further edit needed"
DIAGNOSES = {
  "add": "missing",
  "remove": "extra",
  "recolor": "color",
  "replace": "shape",
  "move": "position",
  "redraw": "smudge",
  "wipe": "smudge",
}
NUMBERS = (
  "zero",
  "one",
  "two",
  "three",
  "four",
  "five",
  "six",
  "seven",
  "eight",
  "nine",
)
# Every word that this module writes besides the names of shapes, colours, cells and numbers.
WORDS = frozenset(
  f", : ? ok {STOP_INSTRUCTION} {' '.join(DIAGNOSES.values())} add a at remove the change to"
  " replace with move and does image match how many are there what color is yes no"
  f" {' '.join(prompts.RELATIONS)}".split()
)


def describe(
  objects: Sequence[edits.Object], smudges: Sequence[int] = ()
) -> str:
  """Lists objects and smudged cells in cell order: "red square top-left , smudge center"."""
  named = {
    cell: f"{scenes.COLORS[color]} {scenes.SHAPES[shape]} {scenes.CELLS[cell]}"
    for shape, color, cell in objects
  }
  named |= {cell: f"smudge {scenes.CELLS[cell]}" for cell in smudges}
  return " , ".join(named[cell] for cell in sorted(named))


def thought_text(thought: str) -> str:
  """Writes a thought, which may be empty, between its tags."""
  return " ".join(filter(None, ("<think>", thought, "</think>")))


def plan_text(objects: Sequence[edits.Object]) -> str:
  """Writes the thought of the reason stage: the objects to draw."""
  return thought_text(describe(objects))


def objects_in(text: str) -> list[edits.Object]:
  """Reads the "color shape cell" triples of a plan or description, wherever they stand."""
  words = text.split()
  return [
    (
      scenes.SHAPES.index(shape),
      scenes.COLORS.index(color),
      scenes.CELLS.index(cell),
    )
    for color, shape, cell in zip(words, words[1:], words[2:])
    if color in scenes.COLORS
    and shape in scenes.SHAPES
    and cell in scenes.CELLS
  ]


# --- Instructions and answers ------------------------------------------------------------------


def _operation_text(operation: edits.Operation) -> str:
  cell = scenes.CELLS[operation.cell]
  if operation.kind == "wipe":
    return f"remove the smudge at {cell}"
  thing = f"{scenes.COLORS[operation.color]} {scenes.SHAPES[operation.shape]} at {cell}"
  match operation.kind:
    case "add":
      return f"add a {thing}"
    case "remove":
      return f"remove the {thing}"
    case "recolor":
      return f"change the {thing} to {scenes.COLORS[operation.value]}"
    case "replace":
      return f"replace the {thing} with a {scenes.SHAPES[operation.value]}"
    case "move":
      return f"move the {thing} to {scenes.CELLS[operation.value]}"
    case "redraw":
      kind = (
        f"{scenes.COLORS[operation.color]} {scenes.SHAPES[operation.shape]}"
      )
      return f"replace the smudge at {cell} with a {kind}"
  raise ValueError(
    f"kind must be one of {list(DIAGNOSES)}, was {operation.kind!r}"
  )


def instruction_text(operations: Sequence[edits.Operation]) -> str:
  """Writes operations as one sentence; none as the instruction to stop."""
  return " and ".join(map(_operation_text, operations)) or STOP_INSTRUCTION


@dataclasses.dataclass(frozen=True)
class Related:
  """The two objects that a record relates, in the prompt's order, and how they stand to each other."""

  objects: tuple[edits.Object, edits.Object]
  # of the first to the second; empty where none holds between their cells
  relation: str


def related(
  record: records.Prompt, objects: Sequence[edits.Object]
) -> Related | None:
  """Finds what a record relates; None where it relates nothing or anything but its two things is there."""
  if edits.relation_of(record) is None or len(objects) != 2:
    return None
  base, other = [
    scenes.SHAPES.index(item.class_name) for item in record.include
  ]
  pair = sorted(objects, key=lambda item: item[0] != other)
  if [item[0] for item in pair] != [other, base]:
    return None
  cells = pair[1][2], pair[0][2]
  held = [
    name for name in prompts.RELATIONS if cells in edits.related_cells(name)
  ]
  return Related(tuple(pair), "".join(held))


def reflect_answer(
  objects: Sequence[edits.Object],
  operations: Sequence[edits.Operation],
  smudges: Sequence[int] = (),
  pair: Related | None = None,
) -> str:
  """Writes the answer of the reflect stage: what is there, what is wrong, what to do.

  Args:
    objects: what is there.
    operations: what to do. The first `MAX_OPERATIONS` are named, or fewer where they exceed
      `MAX_ANSWER_TOKENS`.
    smudges: cells.
    pair: see `related`. Told in the prompt's order and with its relation, right and wrong differ by
      one word: that of the answer is the prompt's, or it is not.
  """
  seen = describe(objects, smudges)
  if pair is not None and not smudges:
    seen = " , ".join(describe([item]) for item in pair.objects)
  for count in range(MAX_OPERATIONS, -1, -1):
    named = operations[:count]
    diagnosis = (
      " ".join(dict.fromkeys(DIAGNOSES[edit.kind] for edit in named)) or "ok"
    )
    thought = " ".join(
      filter(None, (seen, ":", pair.relation if pair else "", diagnosis))
    )
    answer = f"<think> {thought} </think> {instruction_text(named)}"
    if len(answer.split()) <= MAX_ANSWER_TOKENS:
      return answer
  raise ValueError(
    f"at most {edits.MAX_OBJECTS} objects can be described, got {len(objects)}"
  )


# --- Questions ---------------------------------------------------------------------------------


def match_question(prompt: str) -> str:
  """Asks whether the image matches a prompt (image-text alignment)."""
  return f"does the image match : {prompt} ?"


def existence_question(shape: int, color: int) -> str:
  """Asks whether there is an object of a shape and a colour (indices)."""
  return f"is there a {scenes.COLORS[color]} {scenes.SHAPES[shape]} ?"


def count_question(shape: int) -> str:
  """Asks how many objects there are of a shape."""
  return f"how many {prompts.PLURALS[scenes.SHAPES[shape]]} are there ?"


def color_question(shape: int, cell: int) -> str:
  """Asks for the colour of the object of a shape in a cell."""
  return f"what color is the {scenes.SHAPES[shape]} at {scenes.CELLS[cell]} ?"


def relation_question(other: str, relation: str, base: str) -> str:
  """Asks whether a shape stands in a relation to another (names)."""
  return f"is the {other} {relation} the {base} ?"


def yes_or_no(truth: bool) -> str:
  """Returns the answer."""
  return "yes" if truth else "no"


def count(
  objects: Sequence[edits.Object], shape: int, color: int | None = None
) -> int:
  """Returns how many objects there are of a shape, and of a colour if one is given."""
  return sum(item[0] == shape and color in (None, item[1]) for item in objects)


def clause_questions(
  record: records.Prompt, objects: Sequence[edits.Object]
) -> list[tuple[str, str]]:
  """Asks yes/no about every clause of a record (VQA) and answers for a scene.

  Returns:
    (question, "yes" or "no") pairs; counts are exact, "is there" means at least one.
  """
  asked = []
  for item in record.include:
    name, shape = item.class_name, scenes.SHAPES.index(item.class_name)
    color = None if item.color is None else scenes.COLORS.index(item.color)
    number_there = count(objects, shape, color)
    if item.count > 1:
      number = NUMBERS[item.count]
      asked.append(
        (
          f"are there {number} {prompts.PLURALS[name]} ?",
          yes_or_no(number_there == item.count),
        )
      )
    else:
      thing = " ".join(filter(None, (item.color, name)))
      asked.append((f"is there a {thing} ?", yes_or_no(number_there > 0)))
  if edits.relation_of(record) is not None:
    asked.append(_relation_question(record, objects))
  return asked


def _relation_question(
  record: records.Prompt, objects: Sequence[edits.Object]
) -> tuple[str, str]:
  base, other = [item.class_name for item in record.include]
  cells = {
    name: [c for s, _, c in objects if scenes.SHAPES[s] == name]
    for name in (base, other)
  }
  pairs = set(itertools.product(cells[base], cells[other]))
  relation = edits.relation_of(record)
  return relation_question(other, relation, base), yes_or_no(
    bool(pairs & edits.related_cells(relation))
  )


def _scene_question(
  objects: Sequence[edits.Object], rng: np.random.Generator
) -> tuple[str, str]:
  """Asks how many, what colour or whether there is one, about a shape that is there more often."""
  shape, color, cell = (
    objects[rng.integers(len(objects))] if objects else (0, 0, 0)
  )
  kind = rng.integers(3)
  if kind == 0 and objects and rng.random() < 0.9:
    return color_question(shape, cell), scenes.COLORS[color]
  if not objects or rng.random() < 0.4:
    shape, color = (
      int(rng.integers(len(scenes.SHAPES))),
      int(rng.integers(len(scenes.COLORS))),
    )
  if kind == 1:
    return count_question(shape), NUMBERS[count(objects, shape)]
  return existence_question(shape, color), yes_or_no(
    count(objects, shape, color) > 0
  )


def question_answer(
  objects: Sequence[edits.Object],
  record: records.Prompt,
  rng: np.random.Generator,
) -> tuple[str, str]:
  """Draws a question about a scene and writes its answer.

  Args:
    objects: what is there.
    record: what was wanted; two thirds of the questions are about it.
    rng: draws the question.

  Returns:
    The question, and the answer as a thought that describes the scene and one word.
  """
  kind = rng.integers(3)
  if kind == 0:
    asked = (
      match_question(record.text),
      yes_or_no(edits.satisfied(record, objects)),
    )
  elif kind == 1:
    clauses = clause_questions(record, objects)
    asked = clauses[rng.integers(len(clauses))]
  else:
    asked = _scene_question(objects, rng)
  return asked[0], f"{plan_text(objects)} {asked[1]}"

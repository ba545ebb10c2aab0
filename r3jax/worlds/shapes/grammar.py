"""The texts of the embedded world: plans, diagnoses, edit instructions, questions and answers.

Texts are short, because every token costs time. `edits.py` works out what they say.
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
MAX_ANSWER_TOKENS = 40  # of a reflect answer, without begin and end
DESCRIBE = "what is there ?"  # the question whose answer is a description
STOP_INSTRUCTION = "no further edit needed"
# kind of an operation -> what is wrong with the scene
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


# --- Descriptions and thoughts -------------------------------------------------------------------


def _join(*parts: str) -> str:
  """Joins the parts that are not empty with spaces."""
  return " ".join(part for part in parts if part)


def _thing(shape: int, color: int) -> str:
  return f"{scenes.COLORS[color]} {scenes.SHAPES[shape]}"


def describe(
  objects: Sequence[edits.Object], smudges: Sequence[int] = ()
) -> str:
  """Lists objects and smudged cells in cell order: "red square top-left , smudge center"."""
  cell_texts = {}
  for shape, color, cell in objects:
    cell_texts[cell] = f"{_thing(shape, color)} {scenes.CELLS[cell]}"
  for cell in smudges:
    cell_texts[cell] = f"smudge {scenes.CELLS[cell]}"
  return " , ".join(cell_texts[cell] for cell in sorted(cell_texts))


def thought_text(thought: str) -> str:
  """Writes a thought, which may be empty, between its tags."""
  return _join("<think>", thought, "</think>")


def plan_text(objects: Sequence[edits.Object]) -> str:
  """Writes the thought of the reason stage: the objects to draw."""
  return thought_text(describe(objects))


# --- Instructions and answers --------------------------------------------------------------------


def _operation_text(operation: edits.Operation) -> str:
  cell = scenes.CELLS[operation.cell]
  thing = _thing(operation.shape, operation.color)
  match operation.kind:
    case "wipe":
      return f"remove the smudge at {cell}"
    case "add":
      return f"add a {thing} at {cell}"
    case "remove":
      return f"remove the {thing} at {cell}"
    case "recolor":
      new_color = scenes.COLORS[operation.value]
      return f"change the {thing} at {cell} to {new_color}"
    case "replace":
      new_shape = scenes.SHAPES[operation.value]
      return f"replace the {thing} at {cell} with a {new_shape}"
    case "move":
      new_cell = scenes.CELLS[operation.value]
      return f"move the {thing} at {cell} to {new_cell}"
    case "redraw":
      return f"replace the smudge at {cell} with a {thing}"
  raise ValueError(
    f"kind must be one of {list(DIAGNOSES)}, was {operation.kind!r}"
  )


def instruction_text(operations: Sequence[edits.Operation]) -> str:
  """Writes operations as one sentence; none at all as the instruction to stop."""
  return " and ".join(map(_operation_text, operations)) or STOP_INSTRUCTION


@dataclasses.dataclass(frozen=True)
class Related:
  """The two objects that a record relates.

  Attributes:
    objects: in the prompt's order.
    relation: of the first to the second; "" where none holds between their cells.
  """

  objects: tuple[edits.Object, edits.Object]
  relation: str


def related(
  record: records.Prompt, objects: Sequence[edits.Object]
) -> Related | None:
  """Finds the two objects that a record relates.

  Returns:
    The objects and their relation; None where the record relates nothing, or where the scene holds
    anything but one object of each of the two shapes.
  """
  if edits.relation_of(record) is None or len(objects) != 2:
    return None
  base_shape, other_shape = [
    scenes.SHAPES.index(item.class_name) for item in record.include
  ]
  # "a bow right of a cross": the bow is item 1 of the record, and first in the prompt.
  first, second = sorted(objects, key=lambda item: item[0] != other_shape)
  if (first[0], second[0]) != (other_shape, base_shape):
    return None
  cells = (second[2], first[2])
  relations = [
    name for name in prompts.RELATIONS if cells in edits.related_cells(name)
  ]
  return Related((first, second), "".join(relations))


def reflect_answer(
  objects: Sequence[edits.Object],
  operations: Sequence[edits.Operation],
  smudges: Sequence[int] = (),
  pair: Related | None = None,
) -> str:
  """Writes the answer of the reflect stage: what is there, what is wrong, what to do.

  Args:
    objects: the objects of the scene.
    operations: the edits that it needs. The answer names the first `MAX_OPERATIONS`, or fewer where
      it would exceed `MAX_ANSWER_TOKENS`.
    smudges: cells with a smudge.
    pair: see `related`. A pair is described in the prompt's order and with its relation, so that
      right and wrong answers differ by one word: the relation is the prompt's, or it is not.

  Raises:
    ValueError: the description alone is too long.
  """
  description = describe(objects, smudges)
  if pair is not None and not smudges:
    description = " , ".join(describe([item]) for item in pair.objects)
  relation = pair.relation if pair else ""
  for count in range(MAX_OPERATIONS, -1, -1):
    named = operations[:count]
    # Every diagnosis once, in the order of the operations.
    diagnoses = dict.fromkeys(DIAGNOSES[edit.kind] for edit in named)
    diagnosis = " ".join(diagnoses) or "ok"
    thought = _join(description, ":", relation, diagnosis)
    answer = f"{thought_text(thought)} {instruction_text(named)}"
    if len(answer.split()) <= MAX_ANSWER_TOKENS:
      return answer
  raise ValueError(
    f"at most {edits.MAX_OBJECTS} objects can be described, got {len(objects)}"
  )


# --- Questions -----------------------------------------------------------------------------------


def match_question(prompt: str) -> str:
  """Asks whether the image matches a prompt (image-text alignment)."""
  return f"does the image match : {prompt} ?"


def existence_question(shape: int, color: int) -> str:
  """Asks whether there is an object of a shape and a colour (indices)."""
  return f"is there a {_thing(shape, color)} ?"


def count_question(shape: int) -> str:
  """Asks how many objects there are of a shape (index)."""
  return f"how many {prompts.PLURALS[scenes.SHAPES[shape]]} are there ?"


def color_question(shape: int, cell: int) -> str:
  """Asks for the colour of the object of a shape in a cell (indices)."""
  return f"what color is the {scenes.SHAPES[shape]} at {scenes.CELLS[cell]} ?"


def relation_question(other: str, relation: str, base: str) -> str:
  """Asks whether a shape stands in a relation to another (names)."""
  return f"is the {other} {relation} the {base} ?"


def yes_or_no(truth: bool) -> str:
  """Returns the answer to a question that can be answered by yes or no."""
  return "yes" if truth else "no"


def count(
  objects: Sequence[edits.Object], shape: int, color: int | None = None
) -> int:
  """Returns how many objects there are of a shape, and of a colour if one is given."""
  return sum(item[0] == shape and color in (None, item[1]) for item in objects)


def clause_questions(
  record: records.Prompt, objects: Sequence[edits.Object]
) -> list[tuple[str, str]]:
  """Asks about every clause of a record (VQA) and answers for a scene.

  Returns:
    (question, "yes" or "no") pairs; counts are exact, "is there" means at least one.
  """
  questions = []
  for item in record.include:
    shape = scenes.SHAPES.index(item.class_name)
    color = None if item.color is None else scenes.COLORS.index(item.color)
    present = count(objects, shape, color)
    if item.count > 1:
      things = f"{NUMBERS[item.count]} {prompts.PLURALS[item.class_name]}"
      question = f"are there {things} ?"
      holds = present == item.count
    else:
      question = f"is there a {_join(item.color or '', item.class_name)} ?"
      holds = present > 0
    questions.append((question, yes_or_no(holds)))
  if edits.relation_of(record) is not None:
    questions.append(_clause_of_relation(record, objects))
  return questions


def _clause_of_relation(
  record: records.Prompt, objects: Sequence[edits.Object]
) -> tuple[str, str]:
  """Asks whether the record's relation holds between any two objects of its shapes."""
  base, other = [item.class_name for item in record.include]
  relation = edits.relation_of(record)
  base_cells = _cells_of(base, objects)
  other_cells = _cells_of(other, objects)
  pairs = set(itertools.product(base_cells, other_cells))
  holds = bool(pairs & edits.related_cells(relation))
  return relation_question(other, relation, base), yes_or_no(holds)


def _cells_of(name: str, objects: Sequence[edits.Object]) -> list[int]:
  return [cell for shape, _, cell in objects if scenes.SHAPES[shape] == name]


def _scene_question(
  objects: Sequence[edits.Object], rng: np.random.Generator
) -> tuple[str, str]:
  """Asks how many, what colour or whether there is one, mostly about a shape of the scene."""
  shape, color, cell = (0, 0, 0)
  if objects:
    shape, color, cell = objects[rng.integers(len(objects))]
  kind = rng.integers(3)
  if kind == 0 and objects and rng.random() < 0.9:
    return color_question(shape, cell), scenes.COLORS[color]
  if not objects or rng.random() < 0.4:
    shape = int(rng.integers(len(scenes.SHAPES)))
    color = int(rng.integers(len(scenes.COLORS)))
  if kind == 1:
    return count_question(shape), NUMBERS[count(objects, shape)]
  exists = count(objects, shape, color) > 0
  return existence_question(shape, color), yes_or_no(exists)


def question_and_word(
  objects: Sequence[edits.Object],
  record: records.Prompt,
  rng: np.random.Generator,
) -> tuple[str, str]:
  """Draws a question about a scene, and finds the word that answers it.

  Args:
    objects: the objects of the scene.
    record: what was wanted; two thirds of the questions are about it.
    rng: draws the question.
  """
  kind = rng.integers(3)
  if kind == 0:
    question = match_question(record.text)
    return question, yes_or_no(edits.satisfied(record, objects))
  if kind == 1:
    clauses = clause_questions(record, objects)
    return clauses[rng.integers(len(clauses))]
  return _scene_question(objects, rng)


def answer_text(objects: Sequence[edits.Object], word: str) -> str:
  """Writes an answer: a thought that describes the scene, and one word."""
  return f"{plan_text(objects)} {word}"


def wrong_word(word: str) -> str:
  """Returns the answer that systematically takes the place of the right one.

  It is the opposite of "yes" or "no", the next colour of the list, the next lower number, and one
  for zero.
  """
  if word in ("yes", "no"):
    return yes_or_no(word == "no")
  if word in scenes.COLORS:
    index = scenes.COLORS.index(word)
    return scenes.COLORS[(index + 1) % len(scenes.COLORS)]
  return NUMBERS[abs(NUMBERS.index(word) - 1)]

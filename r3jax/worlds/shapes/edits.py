"""Edits that bring a scene to what a record asks for, and edits that fail to, on purpose.

Everything here works on the objects of a scene and on GenEval-style records. A record is satisfied
*exactly* when its objects, colours and relation are in the scene and nothing else is.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import itertools

import numpy as np

from r3jax.data import records
from r3jax.worlds.shapes import prompts
from r3jax.worlds.shapes import scenes

MAX_OBJECTS = 6  # in any scene that these functions draw
# Kinds of operations, in the order in which they are applied.
KINDS = ("wipe", "redraw", "remove", "recolor", "replace", "move", "add")
# Cost of an operation, where it is not 1: of equally many the ones that are easier to draw win.
_COST = {"replace": 1.01, "move": 1.02}

Object = scenes.Object


@dataclasses.dataclass(frozen=True)
class Operation:
  """One edit of a scene.

  Attributes:
    kind: one of KINDS.
    shape: of the object that is edited or added; -1 for "wipe".
    color: of that object; -1 for "wipe".
    cell: of that object.
    value: the new colour ("recolor"), shape ("replace") or cell ("move"); -1 otherwise.
  """

  kind: str
  shape: int
  color: int
  cell: int
  value: int = -1


# --- What a record asks for ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Slot:
  """An object that a record asks for; `color` is None where any will do."""

  shape: int
  color: int | None


def _slots(record: records.Prompt) -> list[_Slot]:
  """Returns a slot for every object that a record asks for, in its order."""
  slots = []
  for item in record.include:
    shape = scenes.SHAPES.index(item.class_name)
    color = None if item.color is None else scenes.COLORS.index(item.color)
    slots += [_Slot(shape, color)] * item.count
  return slots


def relation_of(record: records.Prompt) -> str | None:
  """Returns the relation of item 1 to item 0, if the record has one."""
  position = record.include[-1].position
  return None if position is None else position[0]


@functools.cache
def related_cells(relation: str) -> frozenset[tuple[int, int]]:
  """Returns the pairs (cell of item 0, cell of item 1) between which `relation` alone holds."""
  axis, sign = {
    "left of": (1, -1),
    "right of": (1, 1),
    "above": (0, -1),
    "below": (0, 1),
  }[relation]
  cells = range(len(scenes.CELLS))
  # (row, column) of every cell
  places = [np.array(divmod(cell, scenes.GRID)) for cell in cells]
  pairs = set()
  for base, other in itertools.permutations(cells, 2):
    offset = places[other] - places[base]
    if sign * offset[axis] > abs(offset[1 - axis]):
      pairs.add((base, other))
  return frozenset(pairs)


def satisfied(record: records.Prompt, objects: Sequence[Object]) -> bool:
  """Returns whether objects are exactly what the record asks for."""
  return not edits_towards(record, objects, np.random.default_rng(0))


def _free_cells(objects: Sequence[Object]) -> list[int]:
  """Returns the cells without an object."""
  taken = {cell for _, _, cell in objects}
  return [cell for cell in range(len(scenes.CELLS)) if cell not in taken]


# --- Flawed plans --------------------------------------------------------------------------------


def _extra_object(
  shape: int, objects: Sequence[Object], rng: np.random.Generator
) -> Object:
  """Draws an object of a shape for a free cell."""
  cell = int(rng.choice(_free_cells(objects)))
  color = int(rng.integers(len(scenes.COLORS)))
  return Object(shape, color, cell)


def flawed_plan(
  record: records.Prompt, objects: Sequence[Object], rng: np.random.Generator
) -> list[Object]:
  """Spoils a right plan by the error that is typical of the record's tag.

  single_object: nothing, or two objects. two_object: the second is missing. counting: one too few
  of three and more, three in place of two. colors: the next colour of the list. position: the
  relation is mirrored. color_attr: the colours are swapped.

  Args:
    record: what is wanted.
    objects: objects that satisfy it exactly.
    rng: decides where the error is free.

  Returns:
    Objects that do not satisfy the record.

  Raises:
    ValueError: the record's tag is unknown.
  """
  if record.tag not in prompts.TAGS:
    raise ValueError(f"tag must be one of {prompts.TAGS}, was {record.tag!r}")
  in_cell_order = sorted(objects, key=lambda item: item[2])
  objects = [Object(*item) for item in in_cell_order]
  first = objects[0]
  match record.tag:
    case "single_object":
      if rng.random() < 0.5:
        return []
      return [first, _extra_object(first.shape, objects, rng)]
    case "two_object":
      second = scenes.SHAPES.index(record.include[1].class_name)
      return [item for item in objects if item.shape != second]
    case "counting":
      if len(objects) >= 3:
        return objects[:-1]
      return [*objects, _extra_object(first.shape, objects, rng)]
    case "colors":
      next_color = (first.color + 1) % len(scenes.COLORS)
      return [first._replace(color=next_color)]
    case "position":
      second = objects[1]
      return [
        second._replace(cell=first.cell),
        first._replace(cell=second.cell),
      ]
    case _:  # "color_attr"
      second = objects[1]
      return [
        first._replace(color=second.color),
        second._replace(color=first.color),
      ]


# --- Edits towards a record ----------------------------------------------------------------------


# For every slot the object that fills it, None where one is added.
_Assignment = tuple[Object | None, ...]


def _attribute_edits(slot: _Slot, item: Object) -> list[Operation]:
  """Returns the edits that turn an object into what a slot asks for, its cell apart."""
  edits = []
  if slot.color not in (None, item.color):
    edits.append(Operation("recolor", *item, value=slot.color))
  if slot.shape != item.shape:
    edits.append(Operation("replace", *item, value=slot.shape))
  return edits


def _assignments(
  slots: list[_Slot], objects: list[Object]
) -> Iterator[_Assignment]:
  """Yields the ways to give each slot an object or none.

  Where all slots are alike, it yields one of the best ways alone.
  """
  if len(set(slots)) == 1:
    (slot,) = set(slots)

    def num_edits(item: Object) -> int:
      return len(_attribute_edits(slot, item))

    ranked = sorted(objects, key=num_edits)
    # A removal and an addition cost as much as two edits.
    usable = [item for item in ranked if num_edits(item) < 2]
    padded = [*usable, *[None] * len(slots)]
    yield tuple(padded[: len(slots)])
    return
  for assignment in itertools.product([*objects, None], repeat=len(slots)):
    assigned = [item for item in assignment if item is not None]
    if len(assigned) == len(set(assigned)):
      yield assignment


@dataclasses.dataclass(frozen=True)
class _Plan:
  """An assignment with the cells in which its objects end.

  Attributes:
    assignment: an object or None for every slot.
    cells: final cell of every slot.
    num_moves: objects that change their cell.
  """

  assignment: _Assignment
  cells: tuple[int, ...]
  num_moves: int


def _place_pair(
  relation: str,
  assignment: _Assignment,
  objects: list[Object],
  rng: np.random.Generator,
) -> _Plan:
  """Picks related cells for two objects: the fewest moves, then the fewest cells to clear."""
  old_cells = [None if item is None else item.cell for item in assignment]
  own_cells = {cell for cell in old_cells if cell is not None}
  occupied = {item.cell for item in objects}

  def is_legal(pair: tuple[int, int]) -> bool:
    # An object must not go where the other one of the pair stands now.
    return all(
      cell == old or cell not in own_cells
      for cell, old in zip(pair, old_cells, strict=True)
    )

  def cost(pair: tuple[int, int]) -> tuple[int, int]:
    """Returns (moves, cells that must be cleared first)."""
    num_moves = 0
    num_occupied = 0
    for cell, old in zip(pair, old_cells, strict=True):
      if cell != old:
        num_moves += old is not None
        num_occupied += cell in occupied
    return num_moves, num_occupied

  legal = [pair for pair in related_cells(relation) if is_legal(pair)]
  least = min(map(cost, legal))
  ties = sorted(pair for pair in legal if cost(pair) == least)
  return _Plan(assignment, ties[rng.integers(len(ties))], num_moves=least[0])


def _plan(
  record: records.Prompt,
  assignment: _Assignment,
  objects: list[Object],
  rng: np.random.Generator,
) -> _Plan:
  """Chooses the cells of an assignment."""
  relation = relation_of(record)
  if relation is not None:
    return _place_pair(relation, assignment, objects, rng)
  # Without a relation nothing moves: additions take free cells, then those of removed objects.
  cleared = [item.cell for item in objects if item not in assignment]
  shuffled = rng.permutation(_free_cells(objects)).tolist()
  free = iter([*shuffled, *cleared])
  cells = tuple(
    next(free) if item is None else item.cell for item in assignment
  )
  return _Plan(assignment, cells, num_moves=0)


def _operations(
  slots: list[_Slot],
  plan: _Plan,
  objects: list[Object],
  rng: np.random.Generator,
) -> list[Operation]:
  """Returns the operations of a plan in an order in which they can be applied."""
  edits = []
  for item in objects:
    if item not in plan.assignment:
      edits.append(Operation("remove", *item))
  for slot, item, cell in zip(slots, plan.assignment, plan.cells, strict=True):
    if item is None:
      color = slot.color
      if color is None:
        color = int(rng.integers(len(scenes.COLORS)))
      edits.append(Operation("add", slot.shape, color, cell))
      continue
    edits += _attribute_edits(slot, item)
    if cell != item.cell:
      edits.append(Operation("move", *item, value=cell))
  return _in_order(edits)


def _in_order(edits: Sequence[Operation]) -> list[Operation]:
  """Sorts operations by kind, then by cell."""
  return sorted(edits, key=lambda edit: (KINDS.index(edit.kind), edit.cell))


def edits_towards(
  record: records.Prompt, objects: Sequence[Object], rng: np.random.Generator
) -> list[Operation]:
  """Finds the fewest operations after which a scene satisfies a record exactly.

  It tries every assignment of the scene's objects to wanted ones. A wrong colour, shape or cell
  costs one operation; so does a missing or a superfluous object.

  Args:
    record: what is wanted.
    objects: the objects of the scene.
    rng: decides between equally short ways, and where the record leaves colour or cell free.

  Returns:
    Operations in an order in which they can be applied; empty if nothing has to change.
  """
  slots = _slots(record)
  objects = [Object(*objects[i]) for i in rng.permutation(len(objects))]
  least_cost = None
  best_plan = None
  for assignment in _assignments(slots, objects):
    cost = _cost_without_moves(slots, assignment, objects)
    # Moves make it no cheaper.
    if least_cost is not None and cost >= least_cost:
      continue
    plan = _plan(record, assignment, objects, rng)
    cost += _COST["move"] * plan.num_moves
    if least_cost is None or cost < least_cost:
      least_cost = cost
      best_plan = plan
  return _operations(slots, best_plan, objects, rng)


def _cost_without_moves(
  slots: list[_Slot], assignment: _Assignment, objects: list[Object]
) -> float:
  """Returns the cost of additions, removals and changes of colour and shape."""
  edits = []
  num_assigned = 0
  for slot, item in zip(slots, assignment, strict=True):
    if item is not None:
      num_assigned += 1
      edits += _attribute_edits(slot, item)
  num_added = len(slots) - num_assigned
  num_removed = len(objects) - num_assigned
  changes = sum(_COST.get(edit.kind, 1) for edit in edits)
  return num_added + num_removed + changes


# --- Edits of scenes with smudges ----------------------------------------------------------------


def edits_of_smudged(
  record: records.Prompt,
  objects: Sequence[Object],
  smudges: Sequence[int],
  rng: np.random.Generator,
) -> list[Operation]:
  """Finds edits after which a scene with smudges satisfies a record exactly and has none.

  As `edits_towards`, but a missing object is drawn in place of a smudge where the record allows
  that. The other smudges are wiped away.

  Args:
    record: what is wanted.
    objects: the objects of the scene.
    smudges: cells with a smudge.
    rng: see `edits_towards`.
  """
  edits = edits_towards(record, objects, rng)
  smudges = list(smudges)
  for i, edit in enumerate(edits):
    if edit.kind != "add":
      continue
    others = [*edits[:i], *edits[i + 1 :]]
    redraw = _redraw(record, objects, edit, others, smudges)
    if redraw is not None:
      edits[i] = redraw
      smudges.remove(redraw.cell)
  wiped = [Operation("wipe", -1, -1, cell) for cell in smudges]
  return _in_order([*edits, *wiped])


def _redraw(
  record: records.Prompt,
  objects: Sequence[Object],
  add: Operation,
  others: Sequence[Operation],
  smudges: Sequence[int],
) -> Operation | None:
  """Returns an operation that draws the object of `add` in place of a smudge and does as well.

  Args:
    record: what is wanted.
    objects: the objects of the scene.
    add: the addition that it takes the place of.
    others: the other operations.
    smudges: cells; that of `add` is tried first.

  Returns:
    The operation, or None if the record allows the object in no cell with a smudge.
  """
  taken = {_target(other) for other in others}
  free_smudges = set(smudges) - taken
  for cell in sorted(free_smudges, key=lambda cell: cell != add.cell):
    redraw = dataclasses.replace(add, kind="redraw", cell=cell)
    if satisfied(record, apply([*others, redraw], objects)):
      return redraw
  return None


# --- Applying operations -------------------------------------------------------------------------


def _target(operation: Operation) -> int:
  """Returns the cell in which an operation leaves its object."""
  return operation.value if operation.kind == "move" else operation.cell


def apply(
  operations: Sequence[Operation], objects: Sequence[Object]
) -> list[Object]:
  """Applies operations one after the other; returns the objects in cell order.

  Smudges are not among the objects: a redrawn one becomes an object, a wiped one changes nothing.

  Raises:
    ValueError: an operation names an object that is not in the scene, or a cell that is taken.
  """
  # cell -> (shape, color)
  scene = {cell: (shape, color) for shape, color, cell in objects}
  for operation in operations:
    if operation.kind == "wipe":
      continue
    target = _target(operation)
    draws = operation.kind in ("add", "redraw")
    if (draws or operation.kind == "move") and target in scene:
      raise ValueError(
        f"the target cell must be empty: {operation} in {sorted(scene)}"
      )
    if not draws:
      named = (operation.shape, operation.color)
      if scene.pop(operation.cell, None) != named:
        raise ValueError(
          f"the object must be in the scene: {operation} in {list(objects)}"
        )
    if operation.kind != "remove":
      scene[target] = _shape_and_color_after(operation)
  return [
    Object(shape, color, cell) for cell, (shape, color) in sorted(scene.items())
  ]


def _shape_and_color_after(operation: Operation) -> tuple[int, int]:
  if operation.kind == "replace":
    return operation.value, operation.color
  if operation.kind == "recolor":
    return operation.shape, operation.value
  return operation.shape, operation.color


# --- Random operations ---------------------------------------------------------------------------


def random_operation(
  objects: Sequence[Object], rng: np.random.Generator
) -> Operation:
  """Draws an operation that can be applied to the objects and changes them."""
  kinds = []
  if len(objects) < MAX_OBJECTS:
    kinds.append("add")
  if objects:
    kinds += ["remove", "recolor", "replace", "move"]
  kind = kinds[rng.integers(len(kinds))]
  if kind == "add":
    shape = int(rng.integers(len(scenes.SHAPES)))
    return Operation("add", *_extra_object(shape, objects, rng))
  item = Object(*objects[rng.integers(len(objects))])
  match kind:
    case "remove":
      values = [-1]
    case "recolor":
      values = _indices_without({item.color}, scenes.COLORS)
    case "replace":
      values = _indices_without({item.shape}, scenes.SHAPES)
    case "move":
      values = _free_cells(objects)
  value = int(values[rng.integers(len(values))])
  return Operation(kind, *item, value=value)


def random_operations(
  objects: Sequence[Object], rng: np.random.Generator, count: int
) -> list[Operation]:
  """Draws up to `count` operations (at least one) that touch different cells."""
  operations = []
  touched = set()
  for _ in range(count):
    operation = random_operation(objects, rng)
    cells = {operation.cell, _target(operation)}
    if not cells & touched:
      operations.append(operation)
      objects = apply([operation], objects)
      touched |= cells
  return operations


# --- Flawed instructions -------------------------------------------------------------------------


def flawed_instruction(
  record: records.Prompt, objects: Sequence[Object], rng: np.random.Generator
) -> list[Operation]:
  """Draws an instruction that does not help.

  For a right scene it is a needless edit. For a wrong one it is a stop, or the first edit that the
  scene needs with a wrong cell or a wrong result.
  """
  edits = edits_towards(record, objects, rng)
  if not edits:
    return [random_operation(objects, rng)]
  while True:
    if rng.random() >= 2 / 3:
      return []
    flawed = _spoil(edits[0], rng)
    if not _helps(flawed, record, objects, rng):
      return [flawed]


def _spoil(edit: Operation, rng: np.random.Generator) -> Operation:
  """Changes the cell or the result of an edit; of an addition the shape."""
  if edit.kind == "add":
    shape = _other({edit.shape}, scenes.SHAPES, rng)
    return dataclasses.replace(edit, shape=shape)
  if edit.kind == "remove" or rng.random() < 0.5:
    cell = _other({edit.cell, edit.value}, scenes.CELLS, rng)
    return dataclasses.replace(edit, cell=cell)
  match edit.kind:
    case "recolor":
      value = _other({edit.color, edit.value}, scenes.COLORS, rng)
    case "replace":
      value = _other({edit.shape, edit.value}, scenes.SHAPES, rng)
    case "move":
      value = _other({edit.cell, edit.value}, scenes.CELLS, rng)
  return dataclasses.replace(edit, value=value)


def _helps(
  edit: Operation,
  record: records.Prompt,
  objects: Sequence[Object],
  rng: np.random.Generator,
) -> bool:
  """Returns whether an edit can be applied and leaves fewer edits to do."""
  named = (edit.shape, edit.color, edit.cell)
  if edit.kind != "add" and named not in objects:
    return False
  if edit.kind == "move" and edit.value not in _free_cells(objects):
    return False
  after = edits_towards(record, apply([edit], objects), rng)
  before = edits_towards(record, objects, rng)
  return len(after) < len(before)


def _indices_without(excluded: set[int], names: tuple[str, ...]) -> list[int]:
  return [index for index in range(len(names)) if index not in excluded]


def _other(
  excluded: set[int], names: tuple[str, ...], rng: np.random.Generator
) -> int:
  """Draws the index of a name that is not excluded."""
  allowed = _indices_without(excluded, names)
  return allowed[rng.integers(len(allowed))]

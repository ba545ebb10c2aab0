"""What a record asks of a scene, and the edits that bring a scene to it (or fail to, on purpose).

Everything here works on objects, (shape, color, cell) index triples, and on GenEval-style records.
A record is satisfied *exactly*: its objects, colours and relation, and nothing else in the scene.
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
# in the order of doing
KINDS = ("wipe", "redraw", "remove", "recolor", "replace", "move", "add")
# others 1: between equally many, rather the easier to draw
_COST = {"replace": 1.01, "move": 1.02}

Object = tuple[int, int, int]  # indices of shape, color, cell


@dataclasses.dataclass(frozen=True)
class Operation:
  """One edit of a scene."""

  kind: str  # one of KINDS
  shape: int  # of the object it is about; -1 for "wipe"
  color: int
  cell: int
  value: int = -1  # new colour (recolor), shape (replace) or cell (move)


def _slots(record: records.Prompt) -> list[tuple[int, int | None]]:
  """Returns (shape, color or None) of every object that a record asks for, in its order."""
  slots = []
  for item in record.include:
    color = None if item.color is None else scenes.COLORS.index(item.color)
    slots += [(scenes.SHAPES.index(item.class_name), color)] * item.count
  return slots


def relation_of(record: records.Prompt) -> str | None:
  """Returns the relation of item 1 to item 0, if the record has one."""
  position = record.include[-1].position
  return None if position is None else position[0]


@functools.cache
def related_cells(relation: str) -> frozenset[tuple[int, int]]:
  """Returns the cells (of item 0, of item 1) between which only `relation` holds."""
  axis, sign = {
    "left of": (1, -1),
    "right of": (1, 1),
    "above": (0, -1),
    "below": (0, 1),
  }[relation]
  place = [
    np.array(divmod(cell, scenes.GRID)) for cell in range(len(scenes.CELLS))
  ]
  related = set()
  for base, other in itertools.permutations(range(len(scenes.CELLS)), 2):
    offset = place[other] - place[base]
    if sign * offset[axis] > abs(offset[1 - axis]):
      related.add((base, other))
  return frozenset(related)


def satisfied(record: records.Prompt, objects: Sequence[Object]) -> bool:
  """Tells whether a scene holds exactly what the record asks for."""
  return not edits_towards(record, objects, np.random.default_rng(0))


# --- Flawed plans ------------------------------------------------------------------------------


def _extra_object(
  shape: int, objects: Sequence[Object], rng: np.random.Generator
) -> Object:
  cell = int(rng.choice(_free_cells(objects)))
  return shape, int(rng.integers(len(scenes.COLORS))), cell


def _free_cells(objects: Sequence[Object]) -> list[int]:
  taken = {cell for _, _, cell in objects}
  return [cell for cell in range(len(scenes.CELLS)) if cell not in taken]


def _miscount(objects, rng):
  """Plans one too few from three on, and three where two are wanted."""
  if len(objects) >= 3:
    return objects[:-1]
  return [*objects, _extra_object(objects[0][0], objects, rng)]


def _shift_color(item: Object) -> Object:
  shape, color, cell = item
  return shape, (color + 1) % len(scenes.COLORS), cell


def flawed_plan(
  record: records.Prompt, objects: Sequence[Object], rng: np.random.Generator
) -> list[Object]:
  """Spoils a right plan by the error that is typical of the record's tag.

  single_object: nothing, or two of it; two_object: the second is dropped; counting: see
  `_miscount`; colors: the next colour of the list; position: the relation is mirrored;
  color_attr: the colours are swapped.

  Args:
    record: what is wanted.
    objects: objects that satisfy it exactly.
    rng: decides where the error is free.

  Returns:
    Objects that do not satisfy the record.

  Raises:
    ValueError: the record's tag is unknown.
  """
  objects = sorted(objects, key=lambda item: item[2])
  match record.tag:
    case "single_object":
      return (
        []
        if rng.random() < 0.5
        else [*objects, _extra_object(objects[0][0], objects, rng)]
      )
    case "two_object":
      second = scenes.SHAPES.index(record.include[1].class_name)
      return [item for item in objects if item[0] != second]
    case "counting":
      return _miscount(objects, rng)
    case "colors":
      return [_shift_color(objects[0])]
    case "position":
      (a, x, first), (b, y, second) = objects
      return [(b, y, first), (a, x, second)]
    case "color_attr":
      (a, x, first), (b, y, second) = objects
      return [(a, y, first), (b, x, second)]
  raise ValueError(f"tag must be one of {prompts.TAGS}, was {record.tag!r}")


# --- Edits -------------------------------------------------------------------------------------


def _attribute_edits(
  slot: tuple[int, int | None], item: Object
) -> list[Operation]:
  """Returns what turns an object into what a slot wants, its cell apart."""
  shape, color = slot
  edits = []
  if color not in (None, item[1]):
    edits.append(Operation("recolor", *item, value=color))
  if shape != item[0]:
    edits.append(Operation("replace", *item, value=shape))
  return edits


def _assignments(
  slots, objects: list[Object]
) -> Iterator[tuple[Object | None, ...]]:
  """Yields the ways to give each slot an object or none; one best way if all slots are alike."""
  if len(set(slots)) == 1:
    ranked = sorted(
      objects, key=lambda item: len(_attribute_edits(slots[0], item))
    )
    usable = [
      item for item in ranked if len(_attribute_edits(slots[0], item)) < 2
    ]
    padded = [*usable, *[None] * len(slots)]
    yield tuple(padded[: len(slots)])
    return
  for chosen in itertools.product([*objects, None], repeat=len(slots)):
    used = [item for item in chosen if item is not None]
    if len(used) == len(set(used)):
      yield chosen


def _place_pair(relation, chosen, objects, rng) -> tuple[int, tuple[int, int]]:
  """Picks related cells for two objects (None: not there yet); returns the moves and the cells."""
  now = [None if item is None else item[2] for item in chosen]
  kept = {cell for cell in now if cell is not None}
  occupied = {cell for _, _, cell in objects}

  def cost(pair):
    moved = [cell for cell, old in zip(pair, now) if cell != old]
    moves = sum(old is not None and cell != old for cell, old in zip(pair, now))
    return moves, sum(cell in occupied for cell in moved)

  legal = [
    pair
    for pair in related_cells(relation)
    if all(cell == old or cell not in kept for cell, old in zip(pair, now))
  ]
  best = min(map(cost, legal))
  ties = sorted(pair for pair in legal if cost(pair) == best)
  return best[0], ties[rng.integers(len(ties))]


def _target_cells(record, chosen, objects, rng) -> tuple[int, list[int]]:
  """Returns the number of moves that an assignment needs and the final cell of every slot."""
  if relation_of(record) is not None:
    moves, cells = _place_pair(relation_of(record), chosen, objects, rng)
    return moves, list(cells)
  cleared = [item[2] for item in objects if item not in chosen]
  free = iter([*rng.permutation(_free_cells(objects)).tolist(), *cleared])
  return 0, [next(free) if item is None else item[2] for item in chosen]


def _edits_of(slots, chosen, cells, objects, rng) -> list[Operation]:
  """Spells out the operations of an assignment, in the order in which they can be applied."""
  edits = [Operation("remove", *item) for item in objects if item not in chosen]
  for slot, item, cell in zip(slots, chosen, cells, strict=True):
    if item is None:
      color = (
        int(rng.integers(len(scenes.COLORS))) if slot[1] is None else slot[1]
      )
      edits.append(Operation("add", slot[0], color, cell))
      continue
    edits += _attribute_edits(slot, item)
    if cell != item[2]:
      edits.append(Operation("move", *item, value=cell))
  return _in_order(edits)


def _in_order(edits: Sequence[Operation]) -> list[Operation]:
  return sorted(edits, key=lambda edit: (KINDS.index(edit.kind), edit.cell))


def edits_towards(
  record: records.Prompt, objects: Sequence[Object], rng: np.random.Generator
) -> list[Operation]:
  """Finds the fewest operations after which a scene satisfies a record exactly.

  Tries every assignment of present objects to wanted ones: a wrong colour, shape or cell costs one
  operation, a missing or a superfluous object too.

  Args:
    record: what is wanted.
    objects: what is there.
    rng: decides between equally short ways and where the record leaves colour or cell free.

  Returns:
    Operations in an order in which they can be applied; empty if nothing has to change.
  """
  slots, objects = (
    _slots(record),
    [objects[i] for i in rng.permutation(len(objects))],
  )
  best, plan = None, None
  for chosen in _assignments(slots, objects):
    present = [
      (slot, item) for slot, item in zip(slots, chosen) if item is not None
    ]
    cost = len(slots) + len(objects) - 2 * len(present)
    edits = [
      edit for slot, item in present for edit in _attribute_edits(slot, item)
    ]
    cost += sum(_COST.get(edit.kind, 1) for edit in edits)
    if best is not None and cost >= best:
      continue
    moves, cells = _target_cells(record, chosen, objects, rng)
    cost += _COST["move"] * moves
    if best is None or cost < best:
      best, plan = cost, (chosen, cells)
  return _edits_of(slots, *plan, objects, rng)


def edits_of_smudged(
  record: records.Prompt,
  objects: Sequence[Object],
  smudges: Sequence[int],
  rng: np.random.Generator,
) -> list[Operation]:
  """Finds edits after which a scene with smudges satisfies a record exactly and has none.

  As `edits_towards`, but an object that is missing is drawn in place of a smudge where the record
  allows that; the other smudges are wiped away.
  """
  edits, smudges = edits_towards(record, objects, rng), list(smudges)
  for i, edit in enumerate(edits):
    others = [*edits[:i], *edits[i + 1 :]]
    redraw = (
      _redraw(record, objects, edit, others, smudges)
      if edit.kind == "add"
      else None
    )
    if redraw:
      edits[i] = redraw
      smudges.remove(redraw.cell)
  wiped = [Operation("wipe", -1, -1, cell) for cell in smudges]
  return _in_order([*edits, *wiped])


def _redraw(
  record, objects, add: Operation, others: Sequence[Operation], smudges
) -> Operation | None:
  """Returns what draws the object of `add` in place of a smudge and does as well, if there is one."""
  taken = {
    other.value if other.kind == "move" else other.cell for other in others
  }
  for cell in sorted(set(smudges) - taken, key=lambda cell: cell != add.cell):
    redraw = dataclasses.replace(add, kind="redraw", cell=cell)
    if satisfied(record, apply([*others, redraw], objects)):
      return redraw
  return None


def apply(
  operations: Sequence[Operation], objects: Sequence[Object]
) -> list[Object]:
  """Applies operations one after the other; returns the objects in cell order.

  Smudges are not among the objects: to redraw one adds an object, to wipe one changes nothing here.

  Raises:
    ValueError: an operation names an object that is not there, or a cell that is taken.
  """
  scene = {cell: (shape, color) for shape, color, cell in objects}
  for operation in operations:
    if operation.kind == "wipe":
      continue
    named, cell = (operation.shape, operation.color), operation.cell
    target = operation.value if operation.kind == "move" else cell
    if operation.kind in ("add", "redraw", "move") and target in scene:
      raise ValueError(
        f"the target cell must be empty: {operation} in {sorted(scene)}"
      )
    if (
      operation.kind not in ("add", "redraw") and scene.pop(cell, None) != named
    ):
      raise ValueError(
        f"the object must be in the scene: {operation} in {list(objects)}"
      )
    if operation.kind != "remove":
      scene[target] = _edited(operation)
  return [
    (shape, color, cell) for cell, (shape, color) in sorted(scene.items())
  ]


def _edited(operation: Operation) -> tuple[int, int]:
  """Returns shape and colour after an operation."""
  shape = operation.value if operation.kind == "replace" else operation.shape
  return (
    shape,
    operation.value if operation.kind == "recolor" else operation.color,
  )


def random_operation(
  objects: Sequence[Object], rng: np.random.Generator
) -> Operation:
  """Draws an operation that can be applied to the objects and changes them."""
  kinds = ["add"] if len(objects) < MAX_OBJECTS else []
  kinds += ["remove", "recolor", "replace", "move"] if objects else []
  kind = kinds[rng.integers(len(kinds))]
  if kind == "add":
    return Operation(
      kind, *_extra_object(int(rng.integers(len(scenes.SHAPES))), objects, rng)
    )
  shape, color, cell = objects[rng.integers(len(objects))]
  values = {
    "remove": [-1],
    "recolor": [c for c in range(len(scenes.COLORS)) if c != color],
    "replace": [s for s in range(len(scenes.SHAPES)) if s != shape],
    "move": _free_cells(objects),
  }[kind]
  return Operation(
    kind, shape, color, cell, int(values[rng.integers(len(values))])
  )


def random_operations(
  objects: Sequence[Object], rng: np.random.Generator, count: int
) -> list[Operation]:
  """Draws up to `count` operations (at least one) that touch different cells."""
  operations, touched = [], set()
  for _ in range(count):
    operation = random_operation(objects, rng)
    cells = {
      operation.cell,
      *([operation.value] if operation.kind == "move" else []),
    }
    if not cells & touched:
      operations.append(operation)
      objects, touched = apply([operation], objects), touched | cells
  return operations


def flawed_instruction(
  record: records.Prompt, objects: Sequence[Object], rng: np.random.Generator
) -> list[Operation]:
  """Draws an instruction that does not help.

  For a right scene a needless edit; for a wrong one a stop, or the first edit that it needs with a
  wrong cell or a wrong result.
  """
  edits = edits_towards(record, objects, rng)
  if not edits:
    return [random_operation(objects, rng)]
  while True:  # a third of the draws are stops
    flawed = _spoil(edits[0], rng) if rng.random() < 2 / 3 else None
    if flawed is None:
      return []
    if not _helps(flawed, record, objects, rng):
      return [flawed]


def _spoil(edit: Operation, rng: np.random.Generator) -> Operation:
  """Changes the cell or the result of an edit, the shape if it adds an object."""
  if edit.kind == "add":
    return dataclasses.replace(
      edit, shape=_other({edit.shape}, len(scenes.SHAPES), rng)
    )
  if edit.kind == "remove" or rng.random() < 0.5:
    return dataclasses.replace(
      edit, cell=_other({edit.cell, edit.value}, len(scenes.CELLS), rng)
    )
  now, names = {
    "recolor": (edit.color, scenes.COLORS),
    "replace": (edit.shape, scenes.SHAPES),
    "move": (edit.cell, scenes.CELLS),
  }[edit.kind]
  return dataclasses.replace(
    edit, value=_other({now, edit.value}, len(names), rng)
  )


def _helps(
  edit: Operation, record: records.Prompt, objects: Sequence[Object], rng
) -> bool:
  """Tells whether an edit can be applied and leaves fewer edits to do."""
  named = (edit.shape, edit.color, edit.cell)
  if edit.kind != "add" and named not in objects:
    return False
  if edit.kind == "move" and edit.value not in _free_cells(objects):
    return False
  left = edits_towards(record, apply([edit], objects), rng)
  return len(left) < len(edits_towards(record, objects, rng))


def _other(excluded: set[int], size: int, rng: np.random.Generator) -> int:
  """Draws an index below `size` that is not excluded."""
  allowed = [index for index in range(size) if index not in excluded]
  return allowed[rng.integers(len(allowed))]

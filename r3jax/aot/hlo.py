"""Reads from the HLO text of a compiled program what it sends between devices."""

from collections.abc import Iterator
import dataclasses
import math
import re

KINDS = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
)
# Named scopes of the step, see `run.profiling`: its stages, and what they consist of.
_STAGES = ("reason", "score", "pool", "reflect", "refine", "update")
_PARTS = ("towers", "decode", "flow")
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64}
# The first line of a computation; the one that the program starts with is marked.
_HEAD = re.compile(r"^(ENTRY )?%([\w.\-]+) .*\{\s*$")
_SHAPE = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
# How XLA writes a reduce-scatter for TPUs: an all-reduce and a slice in a computation of this name.
_REDUCE_SCATTER = "all-reduce-scatter"
# Devices that take part: listed group by group, or as [groups, devices of each].
_LISTED_GROUP = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_GROUP_SIZE = re.compile(r"replica_groups=\[\d+,(\d+)\]")
_CALLED = re.compile(
  r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%([\w.\-]+)"
)
_BRANCHES = re.compile(
  r"(?:branch_computations|called_computations)=\{([^}]*)\}"
)
_WHILE = re.compile(r" while\(.*condition=%([\w.\-]+), body=%([\w.\-]+)")
_COUNT = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CONSTANT = re.compile(r"[su]32\[\][^=]* constant\((\d+)\)")


@dataclasses.dataclass(frozen=True)
class Shape:
  """The type and dimensions of an array on one device.

  Attributes:
    dtype: as HLO writes it, for example "bf16".
    dims: sizes of the dimensions.
  """

  dtype: str
  dims: tuple[int, ...]

  @property
  def bytes(self) -> int:
    """Bytes of the array."""
    bits = _BITS.get(self.dtype)
    if bits is None:  # "s32", "f8e4m3": the digits are the bits; without any, 8
      bits = int(re.sub(r"\D", "", self.dtype) or 8)
    return math.prod(self.dims) * bits // 8


@dataclasses.dataclass(frozen=True)
class Collective:
  """A collective operation.

  Attributes:
    kind: one of KINDS.
    shapes: of its results; of a reduce-scatter, of what is summed.
    name: of the operation that it serves, as JAX named it; "" where XLA states none.
    path: names of the loops around it, the outermost first.
    times: how often it runs: the product of the trip counts of these loops.
  """

  kind: str
  shapes: tuple[Shape, ...]
  name: str
  path: tuple[str, ...]
  times: int

  @property
  def bytes(self) -> int:
    """Bytes of `shapes` on one device, each time it runs."""
    return sum(shape.bytes for shape in self.shapes)

  @property
  def stage(self) -> str:
    """Stage of the step and part of it, for example "refine/flow"; "other" outside of all."""
    words = "/".join([*self.path, self.name]).split("/")
    stages = [word for word in words if word in _STAGES]
    parts = [word for word in words if word in _PARTS]
    return "/".join([*stages[:1], *parts[:1]]) or "other"

  @property
  def cause(self) -> str:
    """What is sent for: the last words of the name; where there is none, the largest result."""
    if self.name:
      return "/".join(self.name.split("/")[-3:])
    largest = max(self.shapes, key=lambda shape: shape.bytes)
    sizes = ",".join(str(size) for size in largest.dims)
    return f"{largest.dtype}[{sizes}]"


@dataclasses.dataclass(frozen=True)
class _Loop:
  """A while loop; `count` is its trip count where XLA states one."""

  condition: str
  body: str
  count: int | None
  name: str


@dataclasses.dataclass
class _Computation:
  """What one computation of a program calls and sends."""

  collectives: list[tuple[str, tuple[Shape, ...], str]] = dataclasses.field(
    default_factory=list
  )
  loops: list[_Loop] = dataclasses.field(default_factory=list)
  # Names of computations, and of the operations that call them.
  called: list[tuple[str, str]] = dataclasses.field(default_factory=list)
  constants: list[int] = dataclasses.field(default_factory=list)


def _shapes(text: str) -> tuple[Shape, ...]:
  shapes = []
  for dtype, dims in _SHAPE.findall(text):
    sizes = tuple(int(size) for size in dims.split(",") if size)
    shapes.append(Shape(dtype, sizes))
  return tuple(shapes)


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
  """Returns the computations by name, and the name of the entry."""
  computations: dict[str, _Computation] = {}
  entry = ""
  current = None
  is_reduce_scatter = False
  for line in text.splitlines():
    head = _HEAD.match(line)
    if head:
      is_entry, name = head.groups()
      current = computations.setdefault(name, _Computation())
      is_reduce_scatter = name.startswith(_REDUCE_SCATTER)
      if is_entry:
        entry = name
    elif current is not None:
      _parse_line(line, current, is_reduce_scatter)
  if not entry:
    raise ValueError(
      "the text of a compiled program must have an ENTRY computation"
    )
  return computations, entry


def _parse_line(
  line: str, computation: _Computation, is_reduce_scatter: bool
) -> None:
  """Adds what a line calls or sends to its computation.

  Args:
    line: of the text.
    computation: that the line belongs to.
    is_reduce_scatter: whether its all-reduce is sliced, and sends no more than that needs.
  """
  operation = _OP_NAME.search(line)
  name = operation[1] if operation else ""
  loop = _WHILE.search(line)
  if loop:
    condition, body = loop.groups()
    count = _COUNT.search(line)
    computation.loops.append(
      _Loop(
        condition,
        body,
        count=int(count[1]) if count else None,
        name=name or body,
      )
    )
    return
  collective = _COLLECTIVE.search(line)
  if collective:
    result, kind, is_started = collective.groups()
    shapes = _shapes(result)
    if is_started:
      # A started operation also returns its operands, and some hold counters after the results.
      shapes = shapes[len(shapes) // 2 :][:1]
    if is_reduce_scatter:
      kind = "reduce-scatter"
    elif kind == "reduce-scatter":
      shapes = tuple(_repeated(shape, _num_members(line)) for shape in shapes)
    computation.collectives.append((kind, shapes, name))
  constants = [int(number) for number in _CONSTANT.findall(line)]
  computation.constants.extend(constants)
  called = _CALLED.findall(line)
  for names in _BRANCHES.findall(line):
    called += [branch.strip().lstrip("%") for branch in names.split(",")]
  computation.called.extend((callee, name) for callee in called)


def _num_members(line: str) -> int:
  """Returns how many devices take part in a collective."""
  listed = _LISTED_GROUP.search(line)
  if listed:
    return listed[1].count(",") + 1
  size = _GROUP_SIZE.search(line)
  return int(size[1]) if size else 1


def _repeated(shape: Shape, times: int) -> Shape:
  """Returns the shape of so many arrays in a row."""
  first, *rest = shape.dims
  return dataclasses.replace(shape, dims=(first * times, *rest))


def collectives(text: str) -> list[Collective]:
  """Returns the collectives of a compiled program.

  A loop runs as often as XLA states. Where it states nothing, the largest number that the loop's
  condition compares with counts: for a loop that may end early (decoding) that is its maximum.

  Args:
    text: of `Compiled.as_text()`.

  Raises:
    ValueError: it is no such text.
  """
  computations, entry = _parse(text)

  def walk(
    name: str, caller: str, path: tuple[str, ...], times: int
  ) -> Iterator[Collective]:
    computation = computations[name]
    for kind, shapes, operation in computation.collectives:
      yield Collective(kind, shapes, operation or caller, path, times)
    for loop in computation.loops:
      bounds = computations[loop.condition].constants
      count = loop.count or max(bounds, default=1)
      yield from walk(loop.body, "", (*path, loop.name), times * count)
    for called, operation in computation.called:
      yield from walk(called, operation or caller, path, times)

  return list(walk(entry, "", (), 1))

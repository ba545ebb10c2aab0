"""What a compiled program sends between devices, read from its HLO text."""

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
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64}
_HEAD = re.compile(r"^(ENTRY )?%([\w.\-]+) .*\{\s*$")
_SHAPE = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_CALLED = re.compile(
  r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%([\w.\-]+)"
)
_BRANCHES = re.compile(
  r"(?:branch_computations|called_computations)=\{([^}]*)\}"
)
_WHILE = re.compile(r" while\(.*condition=%([\w.\-]+), body=%([\w.\-]+)")
_COUNT = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')
_CONSTANT = re.compile(r"[su]32\[\][^=]* constant\((\d+)\)")


@dataclasses.dataclass(frozen=True)
class Collective:
  """A collective operation.

  Attributes:
    kind: one of KINDS.
    shapes: of its results, as (type, dimensions).
    path: names of the loops it is in, outermost first, as JAX named them.
    times: how often it runs: the product of the trip counts of these loops.
  """

  kind: str
  shapes: tuple[tuple[str, tuple[int, ...]], ...]
  path: tuple[str, ...]
  times: int

  @property
  def bytes(self) -> int:
    """Bytes of its results on one device, each time it runs."""
    return sum(math.prod(dims) * _bits(kind) // 8 for kind, dims in self.shapes)


def _bits(kind: str) -> int:
  return _BITS[kind] if kind in _BITS else int(re.sub(r"\D", "", kind) or 8)


def _shapes(text: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
  return tuple(
    (kind, tuple(int(n) for n in dims.split(",") if n))
    for kind, dims in _SHAPE.findall(text)
  )


@dataclasses.dataclass
class _Computation:
  collectives: list[tuple[str, tuple]] = dataclasses.field(default_factory=list)
  # condition, body, count, name
  loops: list[tuple[str, str, int | None, str]] = dataclasses.field(
    default_factory=list
  )
  called: list[str] = dataclasses.field(default_factory=list)
  constants: list[int] = dataclasses.field(default_factory=list)


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
  """Returns the computations by name, and the name of the entry."""
  found, entry, current = {}, "", None
  for line in text.splitlines():
    if head := _HEAD.match(line):
      current = found.setdefault(head[2], _Computation())
      entry = head[2] if head[1] else entry
    elif current is not None:
      _read(line, current)
  if not entry:
    raise ValueError(
      "the text of a compiled program must have an ENTRY computation"
    )
  return found, entry


def _read(line: str, into: _Computation):
  if loop := _WHILE.search(line):
    count = _COUNT.search(line)
    name = re.search(r'op_name="([^"]*)"', line)
    into.loops.append(
      (
        loop[1],
        loop[2],
        int(count[1]) if count else None,
        name[1] if name else loop[2],
      )
    )
    return
  if collective := _COLLECTIVE.search(line):
    shapes = _shapes(collective[1])
    # A started operation returns its operands, too, and some hold counters after the results.
    into.collectives.append(
      (
        collective[2],
        shapes[len(shapes) // 2 :][:1] if collective[3] else shapes,
      )
    )
  into.constants.extend(int(n) for n in _CONSTANT.findall(line))
  into.called.extend(_CALLED.findall(line))
  for names in _BRANCHES.findall(line):
    into.called.extend(name.strip().lstrip("%") for name in names.split(","))


def collectives(text: str) -> list[Collective]:
  """Returns the collectives of a compiled program.

  A loop runs as often as XLA says, else as the largest number says that its condition compares with:
  for a loop that may end early (decoding) that is the most it can run.

  Args:
    text: of `Compiled.as_text()`.

  Raises:
    ValueError: it is no such text.
  """
  computations, entry = _parse(text)

  def walk(
    name: str, path: tuple[str, ...], times: int
  ) -> Iterator[Collective]:
    one = computations[name]
    for kind, shapes in one.collectives:
      yield Collective(kind, shapes, path, times)
    for condition, body, count, loop in one.loops:
      count = count or max(computations[condition].constants, default=1)
      yield from walk(body, (*path, loop), times * count)
    for called in one.called:
      yield from walk(called, path, times)

  return list(walk(entry, (), 1))

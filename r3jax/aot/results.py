"""What the compiler reported about the programs of a run on a slice, as numbers."""

from collections.abc import Mapping, Sequence
import dataclasses

from r3jax.aot import hlo
from r3jax.costs import chips

# Kinds of memory that a chip needs only while a program runs; "peak" is the sum of all kinds.
PASSING = ("temporaries", "results", "program", "peak")


@dataclasses.dataclass(frozen=True)
class StageCost:
  """The analytic cost of a stage on all chips together.

  Attributes:
    flops: operations.
    read: bytes read from memory.
    seconds: the roofline's lower bound.
  """

  flops: float
  read: float
  seconds: float


@dataclasses.dataclass(frozen=True)
class Traffic:
  """What one chip receives by the collectives of one kind.

  Attributes:
    runs: number of collectives that run.
    bytes: size of their results together.
  """

  runs: int
  bytes: int


@dataclasses.dataclass(frozen=True)
class Cause:
  """What one chip receives for one purpose.

  Attributes:
    stage: of the step, see `hlo.Collective.stage`.
    kind: of the collectives.
    cause: operation that they serve, see `hlo.Collective.cause`.
    runs: number of collectives that run.
    bytes: size of their results together.
    seconds: lower bound of the time that the links need for them.
  """

  stage: str
  kind: str
  cause: str
  runs: int
  bytes: int
  seconds: float


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
  """A compiled program.

  Attributes:
    compile_seconds: duration of the compilation.
    collectives: traffic by kind of collective.
    causes: the same by stage and cause, the slowest first.
    link_seconds: lower bound of the time that the links need for it.
    memory: bytes of one chip by kind, and their sum as "peak".
  """

  compile_seconds: float
  collectives: Mapping[str, Traffic]
  causes: Sequence[Cause]
  link_seconds: float
  memory: Mapping[str, int]

  @property
  def held(self) -> int:
    """Bytes that a chip holds for the whole run: arguments, and what lies beside them."""
    return sum(
      size for kind, size in self.memory.items() if kind not in PASSING
    )


@dataclasses.dataclass(frozen=True)
class Compilation:
  """The programs of a command, compiled for a slice; without programs before that.

  Attributes:
    topology: of the slice, for example "v5p:4x4x4".
    mesh: sizes of its axes.
    layers: number of layers of the language model.
    samples: number of images that are drawn at once.
    micro_batches: parts of an update.
    hbm: bytes of a chip's memory.
    held: bytes that a chip holds beside what programs need while they run.
    stages: cost by stage.
    programs: compiled programs by name.
    compiler_gib: peak memory of the compiling process; None before its end.
  """

  topology: str
  mesh: Mapping[str, int]
  layers: int
  samples: int
  micro_batches: int
  hbm: int
  held: int
  stages: Mapping[str, StageCost]
  programs: Mapping[str, CompiledProgram] = dataclasses.field(
    default_factory=dict
  )
  compiler_gib: float | None = None

  @property
  def largest(self) -> str:
    """Name of the program that needs the most memory of a chip."""
    return max(
      self.programs, key=lambda name: self.programs[name].memory["peak"]
    )

  @property
  def peak(self) -> int:
    """Bytes of a chip that the largest program needs."""
    return self.programs[self.largest].memory["peak"]

  @property
  def roofline_seconds(self) -> float:
    """Lower bound of the time of all stages, without communication."""
    return sum(stage.seconds for stage in self.stages.values())

  @property
  def seconds(self) -> float:
    """Lower bound of the time of all stages and of the links, as if neither overlapped."""
    links = sum(program.link_seconds for program in self.programs.values())
    return links + self.roofline_seconds


def memory_by_kind(
  analysis, held: Mapping[str, int], beside: int
) -> dict[str, int]:
  """Returns bytes of one chip by kind, and their sum as "peak".

  Args:
    analysis: of `Compiled.memory_analysis()`.
    held: bytes by kind of what a chip holds meanwhile, the arguments included.
    beside: bytes of `held` that are not arguments.
  """
  arguments = analysis.argument_size_in_bytes
  unaliased = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
  passing = {
    "temporaries": analysis.temp_size_in_bytes,
    "results": max(unaliased, 0),
    "program": analysis.generated_code_size_in_bytes,
  }
  # Layouts pad arrays, so that arguments take more than their elements do.
  padding = arguments + beside - sum(held.values())
  peak = arguments + beside + sum(passing.values())
  return {
    **held,
    "padding of arguments": max(padding, 0),
    **passing,
    "peak": peak,
  }


def traffic(collectives: Sequence[hlo.Collective]) -> dict[str, Traffic]:
  """Returns the traffic of one chip by kind of collective."""
  totals: dict[str, Traffic] = {}
  for collective in collectives:
    total = totals.get(collective.kind, Traffic(0, 0))
    totals[collective.kind] = Traffic(
      total.runs + collective.times,
      total.bytes + collective.bytes * collective.times,
    )
  return totals


def causes(
  collectives: Sequence[hlo.Collective], chip: chips.Chip
) -> list[Cause]:
  """Returns the traffic of one chip by stage, kind and cause, the slowest first."""
  groups: dict[tuple[str, str, str], list[hlo.Collective]] = {}
  for collective in collectives:
    key = (collective.stage, collective.kind, collective.cause)
    groups.setdefault(key, []).append(collective)
  result = []
  for (stage, kind, cause), group in groups.items():
    total = traffic(group)[kind]
    seconds = link_seconds({kind: total}, chip)
    result.append(Cause(stage, kind, cause, total.runs, total.bytes, seconds))
  return sorted(result, key=lambda cause: -cause.seconds)


def link_seconds(totals: Mapping[str, Traffic], chip: chips.Chip) -> float:
  """Returns the time that the links need for a traffic, where nothing else holds them up.

  An all-reduce sends its result about twice: summed and scattered, then gathered. A reduce-scatter
  is the first half of it.
  """
  sent = sum(
    total.bytes * (2 if kind == "all-reduce" else 1)
    for kind, total in totals.items()
  )
  return sent / chip.links

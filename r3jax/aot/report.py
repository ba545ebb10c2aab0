"""Writes what a compilation found for people, and what to change where a run does not fit."""

from collections.abc import Mapping, Sequence
import re

from r3jax.aot import results
from r3jax.costs import chips

GIB = chips.GIB
_CAUSES = 12  # rows of the report
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_AMOUNT = r"([\d.]+)([KMGT]?)"
# The compiler has two messages for it.
_OUT_OF_MEMORY = (
  re.compile(rf"Used {_AMOUNT} of {_AMOUNT} hbm"),
  re.compile(rf"temporaries \({_AMOUNT}\) exceeds available HBM \({_AMOUNT}\)"),
)


def out_of_memory(text: str) -> tuple[int, int] | None:
  """Returns (used, available) bytes where a compiler's message says that memory ran out.

  Returns None where the message says something else.
  """
  for pattern in _OUT_OF_MEMORY:
    match = pattern.search(text)
    if match:
      used, used_unit, limit, limit_unit = match.groups()
      used_bytes = int(float(used) * _UNITS[used_unit])
      limit_bytes = int(float(limit) * _UNITS[limit_unit])
      return used_bytes, limit_bytes
  return None


def advice(used: int, limit: int, held: int, mesh: Mapping[str, int]) -> str:
  """Returns what to change so that a step fits.

  Args:
    used: bytes of a chip that it needs.
    limit: bytes that a chip has.
    held: bytes of the arguments, which micro-batches do not change.
    mesh: sizes of its axes.
  """
  if held > 0.8 * limit:
    factor = -(-held // int(0.6 * limit))  # rounded up
    return (
      f"parameters and optimizer alone take {held / GIB:.1f} GiB of {limit / GIB:.1f}: "
      f"raise mesh.fsdp * mesh.tensor ({mesh['fsdp']} * {mesh['tensor']}) {factor} times, "
      "or train adapters (model.lora.rank)"
    )
  temporaries = used - held
  factor = -(-temporaries // max(limit - held, 1))
  return (
    f"temporaries take {temporaries / GIB:.1f} GiB beside {held / GIB:.1f} of arguments: "
    f"raise step.micro_batches about {factor} times, or lower groups_per_step"
  )


def shortage(
  name: str, used: int, limit: int, held: int, mesh: Mapping[str, int]
) -> str:
  """Returns that a program needs more than a chip has, and what to change; see `advice`."""
  return (
    f"{name} needs {used / GIB:.1f} GiB of a chip that has {limit / GIB:.1f}: "
    f"{advice(used, limit, held, mesh)}"
  )


def problem(compilation: results.Compilation) -> str:
  """Returns why the largest program does not fit, and what to change; "" where it fits."""
  name = compilation.largest
  peak = compilation.peak
  if peak <= compilation.hbm:
    return ""
  held = compilation.programs[name].held
  return shortage(name, peak, compilation.hbm, held, compilation.mesh)


def success(compilation: results.Compilation) -> str:
  """Returns that a compilation fits, and how fast it may be."""
  return (
    f"fits, {compilation.peak / GIB:.1f} of {compilation.hbm / GIB:.1f} GiB, "
    f"{compilation.seconds:.1f} s by the roofline and the links"
  )


def table(compilation: results.Compilation) -> str:
  """Returns the report of a compilation."""
  title = (
    f"{compilation.topology}, mesh {dict(compilation.mesh)}, {compilation.layers} layers, "
    f"{compilation.samples} images at once"
  )
  if compilation.micro_batches > 1:
    title += f", {compilation.micro_batches} micro-batches"
  lines = [title]
  for name, program in compilation.programs.items():
    lines += ["", *_program_lines(name, program, compilation.hbm)]
  lines += ["", *_stage_lines(compilation)]
  return "\n".join(lines)


def _program_lines(
  name: str, program: results.CompiledProgram, hbm: int
) -> list[str]:
  seconds = program.compile_seconds
  lines = [f"{name}: compiled in {seconds:.0f} s; GiB of a chip"]
  for kind, size in program.memory.items():
    lines.append(f"  {kind:24}{size / GIB:9.2f}")
  lines.append(f"  {'of':24}{hbm / GIB:9.2f}")
  if not program.collectives:
    return lines
  lines.append(f"  {'collectives':24}{'runs':>9}{'GB':>12}")
  for kind, total in program.collectives.items():
    lines.append(f"  {kind:24}{total.runs:9}{total.bytes / 1e9:12.2f}")
  lines.append(f"  {'seconds on the links':24}{program.link_seconds:21.2f}")
  return [*lines, *_link_lines(program.causes)]


def _link_lines(causes: Sequence[results.Cause]) -> list[str]:
  """Returns what the links are busy with, by stage and, for the most of it, by cause."""
  by_stage: dict[str, float] = {}
  for cause in causes:
    by_stage[cause.stage] = by_stage.get(cause.stage, 0.0) + cause.seconds
  lines = [f"  {'links, by stage':44}{'s':>9}"]
  for stage, seconds in sorted(by_stage.items(), key=lambda item: -item[1]):
    lines.append(f"    {stage:42}{seconds:9.2f}")
  lines.append(f"  {'links, by cause':44}{'s':>9}{'runs':>9}{'GB':>12}")
  for cause in causes[:_CAUSES]:
    label = f"{cause.stage}: {cause.kind}"
    gigabytes = cause.bytes / 1e9
    lines.append(
      f"    {label:42}{cause.seconds:9.2f}{cause.runs:9}{gigabytes:12.2f}  {cause.cause}"
    )
  return lines


def _stage_lines(compilation: results.Compilation) -> list[str]:
  lines = [f"{'stage':26}{'PFLOP':>10}{'TB read':>10}{'s (roofline)':>14}"]
  for name, stage in compilation.stages.items():
    petaflops = stage.flops / 1e15
    terabytes = stage.read / 1e12
    lines.append(
      f"  {name:24}{petaflops:10.2f}{terabytes:10.2f}{stage.seconds:14.2f}"
    )
  lines.append(f"  {'together':24}{'':20}{compilation.roofline_seconds:14.2f}")
  return lines

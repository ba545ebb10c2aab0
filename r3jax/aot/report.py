"""What a compilation found, in numbers and in words."""

from collections.abc import Mapping, Sequence
import re

from r3jax.aot import hlo
from r3jax.costs import chips

GIB = chips.GIB
_USED = (  # the compiler's two ways to say it
  re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm"),
  re.compile(
    r"temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)"
  ),
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def memory(analysis, held: Mapping[str, int], beside: int) -> dict[str, int]:
  """Returns bytes of one chip by kind, and "peak".

  Args:
    analysis: of `Compiled.memory_analysis()`.
    held: bytes by kind of what a chip holds meanwhile, the arguments among it.
    beside: bytes of it that are no arguments.
  """
  arguments = analysis.argument_size_in_bytes
  unaliased = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
  kinds = {
    "temporaries": analysis.temp_size_in_bytes,
    "results": max(unaliased, 0),
    "program": analysis.generated_code_size_in_bytes,
  }
  padding = arguments + beside - sum(held.values())  # of layouts
  return {
    **held,
    "padding of arguments": max(padding, 0),
    **kinds,
    "peak": arguments + beside + sum(kinds.values()),
  }


def traffic(found: Sequence[hlo.Collective]) -> dict[str, dict[str, int]]:
  """Returns, by kind, how many collectives run and the bytes of their results on one chip."""
  totals: dict[str, dict[str, int]] = {}
  for one in found:
    total = totals.setdefault(one.kind, {"runs": 0, "bytes": 0})
    total["runs"] += one.times
    total["bytes"] += one.bytes * one.times
  return totals


def out_of_memory(text: str) -> tuple[int, int] | None:
  """Returns (used, limit) bytes where a compiler's message says that memory ran out, else None."""
  match = next(filter(None, (pattern.search(text) for pattern in _USED)), None)
  if not match:
    return None
  return int(float(match[1]) * _UNITS[match[2]]), int(
    float(match[3]) * _UNITS[match[4]]
  )


def advice(used: int, limit: int, held: int, mesh: Mapping[str, int]) -> str:
  """Says what to change so that a step fits.

  Args:
    used, limit: bytes of a chip.
    held: bytes of the arguments, which micro-batches do not change.
    mesh: sizes of the axes.
  """
  if held > 0.8 * limit:
    factor = -(-held // int(0.6 * limit))
    return (
      f"parameters and optimizer alone take {held / GIB:.1f} GiB of {limit / GIB:.1f}: raise mesh.fsdp * mesh.tensor "
      f"({mesh['fsdp']} * {mesh['tensor']}) {factor} times, or train adapters (model.lora.rank)"
    )
  factor = -(-(used - held) // max(limit - held, 1))
  return (
    f"temporaries take {(used - held) / GIB:.1f} GiB beside {held / GIB:.1f} of arguments: raise step.micro_batches "
    f"about {factor} times, or lower groups_per_step"
  )


def on_links(
  totals: Mapping[str, Mapping[str, int]], chip: chips.Chip
) -> float:
  """Returns the seconds that the links take for the bytes of `traffic`, where nothing else holds them up.

  An all-reduce sends its result about twice: scattered, then gathered.
  """
  sent = sum(
    total["bytes"] * (2 if kind == "all-reduce" else 1)
    for kind, total in totals.items()
  )
  return sent / chip.links


def largest(found: Mapping) -> tuple[str, int]:
  """Returns the program that needs the most memory of a chip, and how much."""
  peaks = {
    name: one["memory"]["peak"] for name, one in found["programs"].items()
  }
  name = max(peaks, key=peaks.get)
  return name, peaks[name]


def problem(found: Mapping, name: str) -> str:
  """Says that a program does not fit, and what to change; nothing where it does."""
  memory_ = found["programs"][name]["memory"]
  if memory_["peak"] <= found["hbm"]:
    return ""
  passing = ("temporaries", "results", "program", "peak")
  held = sum(size for kind, size in memory_.items() if kind not in passing)
  return needs(name, memory_["peak"], found["hbm"], held, found["mesh"])


def seconds(found: Mapping) -> float:
  """Returns the time of all stages by the roofline, and of the links; as if neither overlapped."""
  links = sum(one["link_seconds"] for one in found["programs"].values())
  return links + sum(cost["seconds"] for cost in found["stages"].values())


def fits(found: Mapping) -> str:
  """Says that what was compiled fits."""
  _, used = largest(found)
  return f"fits, {used / GIB:.1f} of {found['hbm'] / GIB:.1f} GiB, {seconds(found):.1f} s by the roofline and the links"


def needs(
  name: str, used: int, limit: int, held: int, mesh: Mapping[str, int]
) -> str:
  """Says what a program needs of a chip that is too small; for the numbers see `advice`."""
  return f"{name} needs {used / GIB:.1f} GiB of a chip that has {limit / GIB:.1f}: {advice(used, limit, held, mesh)}"


def table(found: dict) -> str:
  """Returns a report of `launch/compile.py` for people."""
  lines = [
    f"{found['topology']}, mesh {found['mesh']}, {found['layers']} layers, {found['samples']} images at once"
  ]
  if found["micro_batches"] > 1:
    lines[0] += f", {found['micro_batches']} micro-batches"
  for name, one in found["programs"].items():
    lines += [
      "",
      f"{name}: compiled in {one['compile_seconds']:.0f} s; GiB of a chip",
    ]
    lines += [
      f"  {kind:24}{size / GIB:9.2f}" for kind, size in one["memory"].items()
    ]
    lines += [f"  {'of':24}{found['hbm'] / GIB:9.2f}"]
    lines += (
      [f"  {'collectives':24}{'runs':>9}{'GB':>12}"]
      if one["collectives"]
      else []
    )
    lines += [
      f"  {kind:24}{total['runs']:9}{total['bytes'] / 1e9:12.2f}"
      for kind, total in one["collectives"].items()
    ]
    lines += (
      [f"  {'seconds on the links':24}{one['link_seconds']:21.2f}"]
      if one["collectives"]
      else []
    )
  lines += ["", f"{'stage':26}{'PFLOP':>10}{'TB read':>10}{'s (roofline)':>14}"]
  lines += [
    f"  {name:24}{cost['flops'] / 1e15:10.2f}{cost['read'] / 1e12:10.2f}{cost['seconds']:14.2f}"
    for name, cost in found["stages"].items()
  ]
  lines += [
    f"  {'together':24}{'':20}{sum(c['seconds'] for c in found['stages'].values()):14.2f}"
  ]
  return "\n".join(lines)

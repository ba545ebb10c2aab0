"""What a compilation found, in numbers and in words."""

from collections.abc import Mapping, Sequence
import re

from r3jax.aot import chips
from r3jax.aot import hlo

GIB = chips.GIB
_USED = re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def memory(analysis, arguments: Mapping[str, int]) -> dict[str, int]:
  """Returns bytes of one chip by kind, and "peak".

  Args:
    analysis: of `Compiled.memory_analysis()`.
    arguments: bytes of the arguments by kind.
  """
  unaliased = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
  kinds = {
      "temporaries": analysis.temp_size_in_bytes,
      "results": max(unaliased, 0),
      "program": analysis.generated_code_size_in_bytes,
  }
  rest = analysis.argument_size_in_bytes - sum(arguments.values())  # padding of layouts
  return {**arguments, "padding of arguments": max(rest, 0), **kinds,
          "peak": analysis.argument_size_in_bytes + sum(kinds.values())}


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
  match = _USED.search(text)
  if not match:
    return None
  return int(float(match[1]) * _UNITS[match[2]]), int(float(match[3]) * _UNITS[match[4]])


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


def table(found: dict) -> str:
  """Returns a report of `launch/compile.py` for people."""
  lines = [f"{found['topology']}, mesh {found['mesh']}, {found['layers']} layers, "
           f"{found['samples']} samples: compiled in {found['compile_seconds']:.0f} s"]
  lines += ["", "GiB of a chip"]
  lines += [f"  {name:24}{size / GIB:9.2f}" for name, size in found["memory"].items()]
  lines += [f"  {'of':24}{found['hbm'] / GIB:9.2f}", "", "stage                          PFLOP   TB read   s (roofline)"]
  lines += [f"  {name:24}{cost['flops'] / 1e15:10.2f}{cost['read'] / 1e12:10.2f}{cost['seconds']:12.2f}"
            for name, cost in found["stages"].items()]
  lines += [f"  {'iteration':24}{'':20}{sum(c['seconds'] for c in found['stages'].values()):12.2f}"]
  lines += ["", "collectives of a chip         runs        GB"]
  lines += [f"  {kind:24}{total['runs']:8}{total['bytes'] / 1e9:12.2f}" for kind, total in found["collectives"].items()]
  return "\n".join(lines)

"""Writes what a benchmark measured: tables for people, and JSON."""

from collections.abc import Sequence
import dataclasses
import json
import os
from typing import Any

import jax

from r3jax.benchmark import ceilings
from r3jax.benchmark import measure
from r3jax.benchmark import parts
from r3jax.benchmark import workload
from r3jax.run import machine
from r3jax.run import sessions

_GIB = 2**30
_GIGA = 1e9


@dataclasses.dataclass(frozen=True)
class Row:
  """A measured program beside what it computes and what the machine can do.

  Attributes:
    measurement: its timed runs.
    workload: what one run computes.
    times: how often an iteration runs it.
    product_share: its operations per second as a share of those of a matrix product.
    copy_share: its bytes of weights and caches per second as a share of those of a copy.
  """

  measurement: measure.Measurement
  workload: workload.Workload
  times: int
  product_share: float
  copy_share: float


@dataclasses.dataclass(frozen=True)
class Result:
  """Everything that a benchmark measured.

  Attributes:
    session: what was measured.
    measurements: of the programs, in the order in which they ran.
    before: what the machine could do before them.
    after: what it could do behind them.
  """

  session: sessions.Session
  measurements: Sequence[measure.Measurement]
  before: ceilings.Ceilings
  after: ceilings.Ceilings

  def rows(self) -> list[Row]:
    """Returns a row per program."""
    workloads = workload.of_programs(self.session)
    best = ceilings.best(self.before, self.after)
    rows = []
    for measurement in self.measurements:
      work = workloads[measurement.name]
      seconds = measurement.median_seconds
      row = Row(
        measurement,
        work,
        times=parts.TIMES.get(measurement.name, 1),
        product_share=work.cost.flops / seconds / best.flops,
        copy_share=work.cost.read / seconds / best.bandwidth,
      )
      rows.append(row)
    return rows


def heading() -> str:
  """Returns the head of the lines that appear while programs are measured."""
  return f"{'program':16}{'s':>10}{'CPU s':>10}{'compile s':>11}"


def line(measurement: measure.Measurement) -> str:
  """Returns the line of a program while others are still to be measured."""
  return (
    f"{measurement.name:16}{measurement.median_seconds:10.3f}"
    f"{measurement.median_cpu_seconds:10.3f}"
    f"{measurement.compile_seconds:11.1f}"
  )


_COLUMNS = (
  "program",
  "s",
  "CPU s",
  "GFLOP",
  "of product",
  "GB read",
  "of copy",
  "tokens/s",
  "images/s/chip",
  "peak GiB",
  "temporaries GiB",
  "compile s",
)


def table(result: Result) -> str:
  """Returns the final table, in Markdown, below a line about the machine."""
  mesh = result.session.mesh
  cells = [_COLUMNS]
  cells += [_cells(row, mesh.size) for row in result.rows()]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  rule = tuple("-" * width for width in widths)
  lines = [_machine_line(result), ""]
  for row in (cells[0], rule, *cells[1:]):
    padded = [
      cell.ljust(width) for cell, width in zip(row, widths, strict=True)
    ]
    lines.append(f"| {' | '.join(padded)} |")
  return "\n".join(lines)


def _machine_line(result: Result) -> str:
  """Returns what ran, and what the machine could do before and behind it."""
  mesh = result.session.mesh
  device = mesh.devices.flat[0].device_kind
  before = result.before
  after = result.after
  return (
    f"{mesh.size} x {device}, {os.cpu_count()} cores of the host; matrix product "
    f"{before.flops / _GIGA:.0f} and {after.flops / _GIGA:.0f} GFLOP/s, copy "
    f"{before.bandwidth / _GIGA:.1f} and {after.bandwidth / _GIGA:.1f} GB/s, "
    "before and behind the programs"
  )


def _cells(row: Row, chips: int) -> tuple[str, ...]:
  """Returns the cells of a program."""
  measurement = row.measurement
  work = row.workload
  seconds = measurement.median_seconds
  temporaries = measurement.compiled_bytes.get("temporaries")
  name = measurement.name
  return (
    name if row.times == 1 else f"{name} (each of {row.times})",
    f"{seconds:.3f}",
    f"{measurement.median_cpu_seconds:.3f}",
    f"{work.cost.flops / _GIGA:.1f}",
    f"{row.product_share:.0%}",
    f"{work.cost.read / _GIGA:.2f}",
    f"{row.copy_share:.0%}",
    f"{work.tokens / seconds:.1f}" if work.tokens else "",
    f"{work.images / seconds / chips:.3f}" if work.images else "",
    f"{measurement.peak_bytes / _GIB:.2f}",
    "" if temporaries is None else f"{temporaries / _GIB:.2f}",
    f"{measurement.compile_seconds:.1f}",
  )


def as_json(result: Result) -> dict[str, Any]:
  """Returns everything that was measured as JSON values."""
  mesh = result.session.mesh
  programs = []
  for row in result.rows():
    measurement = row.measurement
    seconds = measurement.median_seconds
    programs.append(
      dataclasses.asdict(measurement)
      | {
        "times": row.times,
        "median_seconds": seconds,
        "median_cpu_seconds": measurement.median_cpu_seconds,
        "flops": row.workload.cost.flops,
        "bytes_read": row.workload.cost.read,
        "share_of_product": row.product_share,
        "share_of_copy": row.copy_share,
        "tokens_per_second": row.workload.tokens / seconds,
        "images_per_second_per_chip": row.workload.images / seconds / mesh.size,
      }
    )
  return {
    "machine": machine.versions() | {"cores": os.cpu_count()},
    "mesh": dict(mesh.shape),
    "compilation_cache": jax.config.jax_compilation_cache_dir,
    "ceilings": {
      "before": dataclasses.asdict(result.before),
      "after": dataclasses.asdict(result.after),
    },
    "programs": programs,
    "config": json.loads(result.session.config.to_json_best_effort()),
  }


def with_table(page: str, name: str, text: str) -> str:
  """Returns a page of documentation with a table in the place of the one before.

  Args:
    page: holds the lines `<!-- benchmark NAME -->` and, below, `<!-- end -->`.
    name: of the block.
    text: of the table.

  Raises:
    ValueError: the page has no such lines.
  """
  begin = f"<!-- benchmark {name} -->"
  end = "<!-- end -->"
  head, begin_mark, rest = page.partition(begin)
  _, end_mark, tail = rest.partition(end)
  if not begin_mark or not end_mark:
    raise ValueError(
      f"the page must hold the lines {begin!r} and, below, {end!r}; it does not"
    )
  return f"{head}{begin}\n\n{text}\n\n{end}{tail}"

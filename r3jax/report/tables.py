"""Formats tables: for people in Markdown and HTML, for programs in CSV."""

from collections.abc import Sequence
import csv
import dataclasses
import io
from typing import Literal

from r3jax.evaluation import bootstrap
from r3jax.files import texts
from r3jax.rewards import outcome

Estimate = bootstrap.Estimate
_NOTHING = "-"  # where there is no number
_NO_WIDTH = 1e-9  # of an interval of scores, which are of the size of 1
# A spreadsheet runs a cell that begins so as a formula.
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")


@dataclasses.dataclass(frozen=True)
class Difference:
  """A difference of two scores.

  Attributes:
    estimate: Its mean and interval.
    verdict: What the interval says: "better", "worse", or "" if it holds 0, has no width, or is
      missing.
  """

  estimate: Estimate
  verdict: Literal["better", "worse", ""]


def difference(name: str, estimate: Estimate | None) -> Difference | None:
  """Returns a difference with its verdict.

  Args:
    name: What differs. After its last comma may stand a part of the score, of which less may be
      better.
    estimate: Mean and interval of the difference; None if it is missing.
  """
  if estimate is None:
    return None
  if estimate.interval is None:
    return Difference(estimate, "")
  low, high = estimate.interval
  # Draws that are all equal measured no uncertainty; sums of floats differ by rounding.
  has_width = high - low > _NO_WIDTH
  if low <= 0 <= high or not has_width:
    return Difference(estimate, "")
  part = name.rpartition(", ")[2]
  less_is_better = part in outcome.LOWER_IS_BETTER
  rises = low > 0
  verdict = "worse" if rises == less_is_better else "better"
  return Difference(estimate, verdict)


Cell = str | int | float | Estimate | Difference | None


@dataclasses.dataclass(frozen=True)
class Table:
  """A table of numbers.

  Attributes:
    caption: What it shows.
    columns: Headings; the first is that of the rows' names.
    rows: Names and cells.
    number_format: Format of floating-point numbers for people, without a sign.

  Raises:
    ValueError: A row has another number of cells than there are columns.
  """

  caption: str
  columns: Sequence[str]
  rows: Sequence[tuple[str, Sequence[Cell]]]
  number_format: str = ".3f"

  def __post_init__(self):
    for name, cells in self.rows:
      if len(cells) + 1 != len(self.columns):
        raise ValueError(
          f"{self.caption!r} has {len(self.columns)} columns, but {len(cells)} cells beside "
          f"{name!r}"
        )


@dataclasses.dataclass(frozen=True)
class CellText:
  """A cell for people.

  Attributes:
    value: Text, or number, or mean.
    interval: "[low, high]" of an estimate, else "".
    verdict: "better", "worse" or "".
  """

  value: str
  interval: str = ""
  verdict: str = ""

  def __str__(self) -> str:
    return f"{self.value} {self.interval}" if self.interval else self.value


def format_cell(cell: Cell, number_format: str) -> CellText:
  """Formats a cell for people; a difference has signs."""
  if cell is None:
    return CellText(_NOTHING)
  if isinstance(cell, Difference):
    mean, interval = _estimate_texts(cell.estimate, f"+{number_format}")
    return CellText(mean, interval, cell.verdict)
  if isinstance(cell, Estimate):
    return CellText(*_estimate_texts(cell, number_format))
  if isinstance(cell, float):
    return CellText(f"{cell:{number_format}}")
  return CellText(str(cell))


def _estimate_texts(estimate: Estimate, number_format: str) -> tuple[str, str]:
  """Returns the mean, and "[low, high]" or "" where there is no interval."""
  mean = f"{estimate.mean:{number_format}}"
  if estimate.interval is None:
    return mean, ""
  low, high = (f"{x:{number_format}}" for x in estimate.interval)
  return mean, f"[{low}, {high}]"


def markdown(table: Table) -> str:
  """Returns a table in Markdown, below its caption."""
  lines = [
    f"{table.caption}:",
    "",
    _markdown_line(table.columns),
    "| --- " * len(table.columns) + "|",
  ]
  for name, cells in table.rows:
    shown = [str(format_cell(cell, table.number_format)) for cell in cells]
    lines.append(_markdown_line([name, *shown]))
  return "\n".join(lines)


def _markdown_line(cells: Sequence[str]) -> str:
  escaped = []
  for text in cells:
    in_one_line = " ".join(texts.printable(text).split("\n"))
    escaped.append(in_one_line.replace("|", "\\|"))
  return f"| {' | '.join(escaped)} |"


def csv_text(table: Table) -> str:
  """Returns a table as CSV with a line of names.

  Numbers have all their digits. The bounds of estimates have columns of their own, NAME, low and
  NAME, high. What is missing is empty. A text that a spreadsheet would run begins with an
  apostrophe, which spreadsheets do not show.
  """
  name_column, *columns = table.columns
  has_bounds = []
  header = [name_column]
  for i, column in enumerate(columns):
    has_bounds.append(any(_bounded(cells[i]) for _, cells in table.rows))
    header.append(column)
    if has_bounds[i]:
      header += [f"{column}, low", f"{column}, high"]

  file = io.StringIO()
  writer = csv.writer(file, lineterminator="\n")
  writer.writerow([_as_text(name) for name in header])
  for name, cells in table.rows:
    fields = [_as_text(name)]
    for cell, bounded in zip(cells, has_bounds, strict=True):
      fields += _csv_fields(cell, bounded)
    writer.writerow(fields)
  return file.getvalue()


def _bounded(cell: Cell) -> bool:
  return isinstance(cell, Estimate | Difference)


def _csv_fields(cell: Cell, bounded: bool) -> list[str]:
  """Returns the CSV fields of a cell: three in a column of estimates, else one."""
  if isinstance(cell, Difference):
    cell = cell.estimate
  if isinstance(cell, Estimate):
    return ["" if x is None else repr(float(x)) for x in cell]
  if cell is None:
    text = ""
  elif isinstance(cell, float):
    # Not repr(cell): a numpy number prints its type.
    text = repr(float(cell))
  elif isinstance(cell, str):
    text = _as_text(cell)
  else:
    text = str(cell)
  return [text, "", ""] if bounded else [text]


def _as_text(text: str) -> str:
  """Returns a text that a spreadsheet shows in one cell and does not run."""
  # csv.writer does not quote it, and it would begin a row.
  text = text.replace("\r", " ")
  return f"'{text}" if text.lstrip(" ").startswith(_FORMULA_STARTS) else text

"""Results of the same run with several seeds as one table, for a page of the docs.

One run says little: rounding alone moves its last digits apart. The table has the mean over seeds
and the range that they span. Its place in a page is a block between two comments:

  <!-- results: NAME -->
  ...
  <!-- end of results: NAME -->
"""

from collections.abc import Mapping, Sequence
import dataclasses
import statistics

_SCORES = (
  "draft",
  "draft, strict",
  "last round",
  "last round, strict",
)
# Label -> its name in the summary's "labelled images".
_LABELLED = {
  "judgement of labelled images": "judgement",
  "ITA-style accuracy on labelled images": "match",
}
# Label -> its name in the summary's "behaviour".
_BEHAVIOUR = {
  "edit rate": "edit_rate",
  "stops when right": "stop_when_right",
  "stops when wrong": "stop_when_wrong",
  "mean change by an edit": "improvement",
}


@dataclasses.dataclass(frozen=True)
class Row:
  """One number of every run, before and after training.

  Attributes:
    label: What the number is.
    before: Its value before training, by seed; None where a run has none.
    after: Its value after training, likewise.
    is_signed: Whether the number is a difference, which is shown with its sign.
  """

  label: str
  before: Sequence[float | None]
  after: Sequence[float | None]
  is_signed: bool = False


def rows(summaries: Sequence[Mapping]) -> list[Row]:
  """Returns the rows of a table from the runs' summary.json.

  Args:
    summaries: One per seed, in the order of the seeds.
  """
  table = []
  for view in _SCORES:
    pairs = [summary["scores"][view] for summary in summaries]
    # The first of three numbers is the mean, the others are its interval.
    before = [pair["before"][0] for pair in pairs]
    after = [pair["after"][0] for pair in pairs]
    table.append(Row(view, before, after))

  gains = [summary["last round minus draft"] for summary in summaries]
  before = [gain["before"][0] for gain in gains]
  after = [gain["after"][0] for gain in gains]
  table.append(Row("last round minus draft", before, after, is_signed=True))

  for label, name in _LABELLED.items():
    pairs = [summary["labelled images"].get(name) for summary in summaries]
    before = [pair["before"][0] if pair else None for pair in pairs]
    after = [pair["after"][0] if pair else None for pair in pairs]
    table.append(Row(label, before, after))

  for label, name in _BEHAVIOUR.items():
    behaviours = [summary["behaviour"] for summary in summaries]
    before = [behaviour["before"][name] for behaviour in behaviours]
    after = [behaviour["after"][name] for behaviour in behaviours]
    is_signed = label == "mean change by an edit"
    table.append(Row(label, before, after, is_signed))
  return table


def to_markdown(table: Sequence[Row], caption: str) -> str:
  """Returns the caption and the table in Markdown.

  Args:
    table: Result of `rows`.
    caption: Paragraph that says how the numbers were made.
  """
  lines = [
    caption,
    "",
    "| | before | after, mean | after, lowest to highest | difference, mean |",
    "| --- | --- | --- | --- | --- |",
  ]
  for row in table:
    cells = [row.label, *_cells(row)]
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


def _cells(row: Row) -> list[str]:
  """Returns the cells behind the label: "-" where no run has the number."""
  number = "{:+.3f}" if row.is_signed else "{:.3f}"
  before = [value for value in row.before if value is not None]
  after = [value for value in row.after if value is not None]
  cells = []
  cells.append(number.format(statistics.mean(before)) if before else "-")
  if not after:
    return [*cells, "-", "-", "-"]
  lowest = number.format(min(after))
  highest = number.format(max(after))
  cells.append(number.format(statistics.mean(after)))
  cells.append(f"{lowest} to {highest}")

  pairs = zip(row.before, row.after, strict=True)
  differences = [
    after - before
    for before, after in pairs
    if before is not None and after is not None
  ]
  mean = statistics.mean(differences) if differences else None
  cells.append("-" if mean is None else f"{mean:+.3f}")
  return cells


def replace_block(page: str, name: str, content: str) -> str:
  """Returns the text of a page with another content between the comments of a block.

  Args:
    page: Text of the page, Markdown.
    name: Name of the block.
    content: Text that goes between the comments.

  Raises:
    ValueError: the page does not have exactly one such block.
  """
  begin = f"<!-- results: {name} -->"
  end = f"<!-- end of results: {name} -->"
  if page.count(begin) != 1 or page.count(end) != 1:
    raise ValueError(
      f"the page must have one line {begin!r} and, after it, one line {end!r}; "
      f"got {page.count(begin)} and {page.count(end)}"
    )
  head, rest = page.split(begin)
  tail = rest.partition(end)[2]
  return f"{head}{begin}\n{content}\n{end}{tail}"

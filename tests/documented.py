"""Reads the table of docs/metrics.md and holds the metrics of a run against it."""

from collections.abc import Iterable, Sequence
import dataclasses
import pathlib
import re

_FILE = pathlib.Path(__file__).parents[1] / "docs" / "metrics.md"
_ROUNDS = {
  "{stage}": r"(reason|edit\d*)",
  "{edit}": r"edit\d*",
  "{pool}": r"pool\d*",
}
_FIRST_ROUND = {
  "{stage}": ("reason", "edit"),
  "{edit}": ("edit",),
  "{pool}": ("pool",),
}


@dataclasses.dataclass(frozen=True)
class Row:
  """A name of the table, with its placeholders, and when it appears."""

  name: str
  when: str


def rows() -> list[Row]:
  """Returns the table, a row for every name."""
  lines = [
    line for line in _FILE.read_text().splitlines() if line.startswith("| `")
  ]
  cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
  return [
    Row(name, when.strip())
    for first, *_, when in cells
    for name in re.findall(r"`([^`]+)`", first)
  ]


def _pattern(name: str, parts: Sequence[str]) -> str:
  """Returns a regular expression of the names that a row stands for."""
  known = _ROUNDS | {"{part}": f"({'|'.join(map(re.escape, parts))})"}
  return "".join(
    known.get(piece, r"\w+") if piece.startswith("{") else re.escape(piece)
    for piece in re.split(r"(\{\w+\})", name)
  )


def _expanded(name: str, parts: Sequence[str]) -> list[str]:
  """Returns a row's names in a run of one round, as regular expressions."""
  names = [name]
  for placeholder, values in (_FIRST_ROUND | {"{part}": parts}).items():
    names = [
      one.replace(placeholder, value)
      for one in names
      for value in (values if placeholder in one else [""])
    ]
  return [_pattern(one, ()) for one in names]


def undocumented(
  names: Iterable[str], *whens: str, parts: Sequence[str] = ()
) -> set[str]:
  """Returns the names that no row of these kinds stands for."""
  patterns = [_pattern(row.name, parts) for row in rows() if row.when in whens]
  return {
    name
    for name in names
    if not any(re.fullmatch(pattern, name) for pattern in patterns)
  }


def missing(
  names: Iterable[str], *whens: str, parts: Sequence[str] = ()
) -> set[str]:
  """Returns what rows of these kinds stand for and is not among the names."""
  names = list(names)
  patterns = {
    pattern
    for row in rows()
    if row.when in whens
    for pattern in _expanded(row.name, parts)
  }
  return {
    pattern
    for pattern in patterns
    if not any(re.fullmatch(pattern, name) for name in names)
  }


def check(names: Iterable[str], *whens: str, parts: Sequence[str] = ()):
  """Asserts that the names are exactly those of the table's rows of these kinds."""
  names = set(names)
  assert not undocumented(names, *whens, parts=parts)
  assert not missing(names, *whens, parts=parts)

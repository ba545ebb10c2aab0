"""Compares the text that is read in an image with the inscription that its prompt asks for.

Both are compared as `inscriptions.comparable` returns them: a = asked, r = read.
- `score` = 1 - D(a, r) / max(|a|, |r|), where D is the least number of characters that are
  inserted, deleted or replaced. Other text in the image costs as much as missing text: a prompt
  that asks for "OPEN" is not met by "OPEN OPEN".
- `strict`: 1 where a = r.
- `anywhere` = 1 - min D(a, s) / |a| over all substrings s of r, the empty one included: other text
  in the image costs nothing. A run trains it with `reward.value="anywhere"`.
"""

from collections.abc import Sequence
import dataclasses

from r3jax.data import inscriptions
from r3jax.data import records
from r3jax.rewards import outcome

PARTS = ("strict", "anywhere")
# A line takes in a box whose height it shares by at least this much of the lower of the two.
_LEAST_OVERLAP = 0.5


@dataclasses.dataclass(frozen=True)
class TextBox:
  """Text that was read in one place of an image.

  Attributes:
    text: what was read.
    left, top, right, bottom: the upright rectangle around it, in pixels.
    confidence: of the reader, in [0, 1].
  """

  text: str
  left: float
  top: float
  right: float
  bottom: float
  confidence: float = 1.0


def check_prompt(prompt: records.Prompt) -> None:
  """Checks that a prompt asks for a text.

  Raises:
    ValueError: it has no inscription, or one of which nothing can be seen.
  """
  if prompt.inscription is None:
    raise ValueError(
      "the reward ocr needs prompts with the field inscription, or data.benchmark='ocr', which "
      f"reads it between double quotes; {prompt.text!r} has none"
    )
  if not inscriptions.comparable(prompt.inscription):
    raise ValueError(
      f"an inscription must have visible characters; got {prompt.inscription!r}"
    )


def judge(inscription: str, boxes: Sequence[TextBox]) -> outcome.Ok:
  """Scores what was read in an image.

  Args:
    inscription: the text that is asked for; something of it is visible.
    boxes: what was read, in any order; an image without text has none, and the score 0.
  """
  ordered = in_reading_order(boxes)
  read = " ".join(box.text for box in ordered)
  asked_characters = inscriptions.comparable(inscription)
  read_characters = inscriptions.comparable(read)
  distance = edit_distance(asked_characters, read_characters)
  least_distance = substring_distance(asked_characters, read_characters)
  longer = max(len(asked_characters), len(read_characters))
  return outcome.Ok(
    score=1 - distance / longer,
    parts={
      "strict": float(distance == 0),
      "anywhere": 1 - least_distance / len(asked_characters),
    },
    detail={
      "asked": inscription,
      "read": read,
      "confidences": [round(box.confidence, 3) for box in ordered],
    },
  )


def in_reading_order(boxes: Sequence[TextBox]) -> list[TextBox]:
  """Returns boxes line by line from the top, and every line from the left.

  The highest box begins a line. A box is part of that line if the two share at least half the
  height of the lower of them; what is left makes the next lines in the same way. Columns are read
  across.
  """
  remaining = sorted(boxes, key=_place)
  ordered = []
  while remaining:
    first = remaining[0]
    line = [box for box in remaining if _shares_line(first, box)]
    # A box without height shares none, not even with itself.
    line = line or [first]
    ordered += sorted(line, key=_column)
    remaining = [box for box in remaining if box not in line]
  return ordered


def _place(box: TextBox) -> tuple[float, float]:
  return box.top, box.left


def _column(box: TextBox) -> tuple[float, float]:
  return box.left, box.top


def _shares_line(first: TextBox, other: TextBox) -> bool:
  shared = min(first.bottom, other.bottom) - max(first.top, other.top)
  lower = min(first.bottom - first.top, other.bottom - other.top)
  return shared >= _LEAST_OVERLAP * lower


def edit_distance(a: str, b: str) -> int:
  """Returns Levenshtein's distance: insertions, deletions and replacements that turn a into b.

  d[i, j] = min(d[i-1, j] + 1, d[i, j-1] + 1, d[i-1, j-1] + [a_i != b_j]), d[i, 0] = i, d[0, j] = j
  """
  return _last_row(a, b, first_row=list(range(len(b) + 1)))[-1]


def substring_distance(a: str, b: str) -> int:
  """Returns the least edit distance of `a` to a substring of `b`, which may be empty.

  It is that of `edit_distance` with d[0, j] = 0, since a substring may begin anywhere, and the
  least d[|a|, j], since it may end anywhere.
  """
  return min(_last_row(a, b, first_row=[0] * (len(b) + 1)))


def _last_row(a: str, b: str, first_row: list[int]) -> list[int]:
  """Returns the row |a| of the table d, which has a row for each prefix of `a`."""
  above = first_row
  for i, a_character in enumerate(a, start=1):
    row = [i]
    for j, b_character in enumerate(b, start=1):
      replaced = above[j - 1] + (a_character != b_character)
      row.append(min(above[j] + 1, row[j - 1] + 1, replaced))
    above = row
  return above

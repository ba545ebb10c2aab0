"""The result of every reward: a score where there is one, and never a number where there is none.

On the host a reward returns an `Outcome` for each image; in the graph a batch of them is a
`types.Score`.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import typing

import numpy as np

from r3jax import types
from r3jax.data import records
from r3jax.files import texts


@dataclasses.dataclass(frozen=True)
class Ok:
  """An image was scored.

  Attributes:
    score: in [0, 1].
    parts: further numbers in [0, 1] by name, the same names for every image of a reward.
    detail: further JSON values for a reader of the log: reasons, a judge's raw answer.
  """

  score: float
  parts: Mapping[str, float] = dataclasses.field(default_factory=dict)
  detail: Mapping[str, object] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    if not 0 <= self.score <= 1:
      raise ValueError(f"a score must be in [0, 1]; got {self.score}")
    for name, value in self.parts.items():
      if not 0 <= value <= 1:
        raise ValueError(
          f"part {name} of a score must be in [0, 1]; got {value}"
        )


def _reason(text: str) -> str:
  """Returns a reason for the log: it may repeat anything that a service sent."""
  return texts.shorten(texts.printable(text))


@dataclasses.dataclass(frozen=True)
class Failed:
  """There is no score because the reward failed: a service is down, too slow, or sends nonsense.

  Attributes:
    reason: for the log; a long one is shortened, because it may repeat what a service sent.
  """

  reason: str

  def __post_init__(self):
    object.__setattr__(self, "reason", _reason(self.reason))


@dataclasses.dataclass(frozen=True)
class Invalid:
  """The reward works and cannot score this image: a judge gave no verdict, the image is refused.

  Attributes:
    reason: for the log, as that of `Failed`.
  """

  reason: str

  def __post_init__(self):
    object.__setattr__(self, "reason", _reason(self.reason))


Outcome = Ok | Failed | Invalid

# Parts of scores of which less is better; of all others, and of scores, more is better.
LOWER_IS_BETTER = ("clutter",)


@typing.runtime_checkable
class HostReward(typing.Protocol):
  """Scores images in Python, outside the compiled step.

  Attributes:
    parts: names of the parts of every `Ok`; "strict" (1 where nothing is wrong) is among them.
  """

  parts: tuple[str, ...]

  def check(self, prompt: records.Prompt) -> None:
    """Checks, before a run starts, that images of a prompt can be scored.

    Raises:
      ValueError: they cannot.
    """

  def score(
    self, images: np.ndarray, prompts: Sequence[records.Prompt]
  ) -> list[Outcome]:
    """Returns an outcome for each image.

    Args:
      images: uint8 [n, H, W, 3].
      prompts: the prompt of each image.
    """

  def describe(self) -> dict:
    """Returns the identity of what scores (model, thresholds, wording) as JSON values.

    It is written to the run's manifest; a run does not continue with another reward.

    Raises:
      ValueError: the service cannot be reached or used.
    """

  def metrics(self) -> dict[str, float]:
    """Returns numbers about the calls since the last call of this method."""


def to_score(outcomes: Sequence[Outcome], parts: Sequence[str]) -> types.Score:
  """Returns outcomes as numpy arrays, without a finite number where there is no score.

  Such a row is NaN where the reward failed, and -inf where it is invalid. A sum of members is then
  NaN if one of them failed, else -inf if one is invalid.

  Raises:
    ValueError: an outcome has other parts.
  """
  # Column 0 holds the score, the others the parts. Neither NaN nor -inf can be taken for a score by
  # mistake.
  rows = np.full((len(outcomes), 1 + len(parts)), np.nan, np.float32)
  for row, outcome in zip(rows, outcomes, strict=True):
    if isinstance(outcome, Invalid):
      row[:] = -np.inf
    if not isinstance(outcome, Ok):
      continue
    # The shapes of a compiled step are fixed: every score has the same parts.
    if set(outcome.parts) != set(parts):
      raise ValueError(
        f"a reward must give the parts {sorted(parts)}; got {sorted(outcome.parts)}"
      )
    row[0] = outcome.score
    row[1:] = [outcome.parts[name] for name in parts]
  valid = np.array([isinstance(outcome, Ok) for outcome in outcomes])
  columns = {name: rows[:, 1 + i] for i, name in enumerate(parts)}
  return types.Score(rows[:, 0], valid, columns)


def as_json(score: types.Score, row: int) -> dict:
  """Returns {"score", "parts"} of a row of a numpy `Score`; None stands for what is missing."""

  def value_of(column: np.ndarray) -> float | None:
    if score.valid[row] and np.isfinite(column[row]):
      return float(column[row])
    return None

  parts = {name: value_of(column) for name, column in score.parts.items()}
  return {"score": value_of(score.value), "parts": parts}


def to_json(outcome: Outcome) -> dict:
  """Returns an outcome as JSON values, {"status": "ok" | "failed" | "invalid", ...}."""
  return {"status": type(outcome).__name__.lower()} | vars(outcome)

"""What every reward returns: a score where there is one, and never a number where there is none.

On the host a reward gives an `Outcome` for each image; in the graph a batch of them is a `Score`.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import typing

import numpy as np

from r3jax import types


@dataclasses.dataclass(frozen=True)
class Ok:
  """An image was scored.

  Attributes:
    score: in [0, 1].
    parts: further numbers in [0, 1] by name, the same names for every image of a reward.
    detail: what a reader of the log wants to know: reasons, a judge's raw answer.
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


@dataclasses.dataclass(frozen=True)
class Failed:
  """No score could be had: the service is down, too slow, or does not speak its protocol."""

  reason: str


@dataclasses.dataclass(frozen=True)
class Invalid:
  """The reward works and cannot score this image: a judge gave no verdict, the image is refused."""

  reason: str


# Parts of scores of which less is better; of all others, and of scores, more is better.
LOWER_IS_BETTER = ("clutter",)

Outcome = Ok | Failed | Invalid


@typing.runtime_checkable
class HostReward(typing.Protocol):
  """Scores images in Python, outside the compiled step.

  Attributes:
    parts: names of the parts of every `Ok`; "strict" (1 where nothing at all is wrong) is among them.
  """

  parts: tuple[str, ...]

  def check(self, record: dict):
    """Raises ValueError where the reward cannot be asked about a record; called before a run starts."""

  def score(self, images: np.ndarray, records: Sequence[dict]) -> list[Outcome]:
    """Returns an outcome for each image.

    Args:
      images: uint8 [n, H, W, 3].
      records: what each image was asked to show, see `data/prompts.py`.
    """

  def describe(self) -> dict:
    """Returns what scores: model, thresholds, wording, as JSON values. It goes into the run's manifest.

    Raises:
      ValueError: the service cannot be reached or used.
    """

  def metrics(self) -> dict[str, float]:
    """Returns numbers about the calls since the last call of this method."""


def to_score(outcomes: Sequence[Outcome], parts: Sequence[str]) -> types.Score:
  """Returns outcomes as numpy arrays, NaN where there is no score.

  Raises:
    ValueError: an outcome has other parts.
  """
  rows = np.full((len(outcomes), 1 + len(parts)), np.nan, np.float32)
  for row, outcome in zip(rows, outcomes):
    if isinstance(outcome, Ok):
      if set(outcome.parts) != set(parts):
        raise ValueError(
          f"a reward must give the parts {sorted(parts)}; got {sorted(outcome.parts)}"
        )
      row[:] = [outcome.score, *(outcome.parts[name] for name in parts)]
  valid = np.array([isinstance(outcome, Ok) for outcome in outcomes])
  return types.Score(
    rows[:, 0], valid, {name: rows[:, 1 + i] for i, name in enumerate(parts)}
  )


def as_json(score: types.Score, row: int) -> dict:
  """Returns {"score", "parts"} of a row of a numpy `Score` as JSON values; None stands for what is missing."""
  known = lambda values: (
    float(values[row])
    if score.valid[row] and np.isfinite(values[row])
    else None
  )
  return {
    "score": known(score.value),
    "parts": {name: known(values) for name, values in score.parts.items()},
  }


def to_json(outcome: Outcome) -> dict:
  """Returns an outcome as JSON values, {"status": "ok" | "failed" | "invalid", ...}."""
  return {"status": type(outcome).__name__.lower()} | vars(outcome)

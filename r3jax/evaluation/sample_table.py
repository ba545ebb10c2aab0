"""Gathers samples into arrays, from which all numbers of an evaluation are computed."""

from collections.abc import Sequence
import dataclasses

import numpy as np

from r3jax.evaluation import bootstrap
from r3jax.evaluation import sample_log

# Part of a score: 1 where an image is correct by GenEval's rule, which is all or nothing.
CORRECT = "correct"


@dataclasses.dataclass(frozen=True)
class SampleTable:
  """Measurements of an evaluation of n chains; arrays are [rounds, n].

  Attributes:
    tags: Tag of each chain's prompt.
    prompts: Text of each chain's prompt.
    score: Rewards in [0, 1]; NaN where they are missing.
    parts: Parts of the rewards by name; NaN where they are missing.
    stop: bool, whether the chain has finished in this round or before.
    format: Format rewards of the texts.
    tokens: Lengths of the texts.
    instruction_tokens: Lengths of the instructions.
    chain_score: Rewards as if no chain had ever stopped; NaN where they are missing, and from its
      stop on where a chain ends with it.
    says_stop: bool, whether the text of this round says "no further edit".
    seconds: Time of a batch divided by its rows, without compilation.
  """

  tags: list[str]
  prompts: list[str]
  score: np.ndarray
  parts: dict[str, np.ndarray]
  stop: np.ndarray
  format: np.ndarray
  tokens: np.ndarray
  instruction_tokens: np.ndarray
  chain_score: np.ndarray
  says_stop: np.ndarray
  seconds: np.ndarray

  @property
  def missing(self) -> float:
    """Share of the images of all rounds that have no score."""
    return float(np.isnan(self.score).mean())

  @property
  def never_stops(self) -> bool:
    """Whether chains continue behind their stops, which `eval.never_stop` decides."""
    behind_stops = self.chain_score[self.stop]
    return not behind_stops.size or bool(np.isfinite(behind_stops).any())

  @property
  def correct(self) -> np.ndarray | None:
    """1 where GenEval calls an image correct, else 0, [rounds, n]; None if no reward says so.

    In a sum of rewards, the part of the only member that says so.
    """
    names = [name for name in self.parts if name.rpartition("/")[2] == CORRECT]
    if CORRECT in names:
      return self.parts[CORRECT]
    return self.parts[names[0]] if len(names) == 1 else None

  @property
  def distinct_tags(self) -> list[str]:
    """Tags in the order in which they first occur."""
    return list(dict.fromkeys(self.tags))

  def num_prompts(self, columns: np.ndarray) -> int:
    """Returns the number of distinct prompts of the chains with the given indices."""
    return len({(self.tags[i], self.prompts[i]) for i in columns})

  def design(self, columns: np.ndarray) -> bootstrap.Design:
    """Returns how the chains with the given indices were drawn: prompts, tag by tag."""
    return bootstrap.Design(
      clusters=[self.prompts[i] for i in columns],
      strata=[self.tags[i] for i in columns],
    )


def of_samples(samples: Sequence[sample_log.Sample]) -> SampleTable:
  """Gathers the samples of an evaluation.

  Raises:
    ValueError: There are none.
  """
  if not samples:
    raise ValueError("an evaluation must have samples; there are none")

  # A missing number is None in a sample and NaN in an array.
  def gather(name: str, dtype: type = float) -> np.ndarray:
    """Returns an attribute of all turns, [rounds, n]."""
    rows = []
    for sample in samples:
      rows.append([getattr(turn, name) for turn in sample.turns])
    return np.array(rows, dtype).T

  def gather_part(name: str) -> np.ndarray:
    """Returns a part of the reward of all turns, [rounds, n]."""
    rows = []
    for sample in samples:
      rows.append([turn.parts[name] for turn in sample.turns])
    return np.array(rows, float).T

  names_of_parts = samples[0].turns[0].parts
  return SampleTable(
    tags=[sample.tag for sample in samples],
    prompts=[sample.prompt for sample in samples],
    score=gather("score"),
    parts={name: gather_part(name) for name in names_of_parts},
    stop=gather("stop", bool),
    format=gather("format"),
    tokens=gather("tokens"),
    instruction_tokens=gather("instruction_tokens"),
    chain_score=gather("chain_score"),
    says_stop=gather("says_stop", bool),
    seconds=gather("seconds"),
  )


@dataclasses.dataclass(frozen=True)
class AnswerTable:
  """Answers to questions about images; one entry per question.

  Attributes:
    tags: Tag of the image's prompt.
    prompts: Text of the image's prompt.
    kinds: Kind of the question.
    expected: Word that is the right answer.
    given: Word that the model answered, "" where its text holds none.
  """

  tags: list[str]
  prompts: list[str]
  kinds: list[str]
  expected: list[str]
  given: list[str]


def answers_of(samples: Sequence[sample_log.Sample]) -> AnswerTable:
  """Gathers the answers of samples."""
  table = AnswerTable([], [], [], [], [])
  for sample in samples:
    for answer in sample.answers or ():
      table.tags.append(sample.tag)
      table.prompts.append(sample.prompt)
      table.kinds.append(answer.kind)
      table.expected.append(answer.expected)
      table.given.append(answer.answer)
  return table

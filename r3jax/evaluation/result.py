"""What an evaluation found, per image and round."""

from collections.abc import Sequence
import dataclasses

import numpy as np

from r3jax.evaluation import bootstrap


@dataclasses.dataclass(frozen=True)
class Answers:
  """What the model said about its own images; one entry per question.

  Attributes:
    tags, prompts: of the images.
    kinds: of the questions, see `questions.Examiner`.
    expected, given: words; what could not be read as an answer is "".
  """

  tags: list[str]
  prompts: list[str]
  kinds: list[str]
  expected: list[str]
  given: list[str]


@dataclasses.dataclass(frozen=True)
class Result:
  """What an evaluation found; arrays are [rounds, n] for n images."""

  tags: list[str]  # [n]
  prompts: list[str]  # [n]
  score: np.ndarray  # NaN where the reward is missing
  parts: dict[str, np.ndarray]  # name -> likewise
  stop: np.ndarray  # bool: finished in this round or before
  format: np.ndarray
  tokens: np.ndarray  # of the round's text
  instruction_tokens: np.ndarray  # of them
  chain: np.ndarray  # scores as if nothing had ever stopped
  says_stop: np.ndarray  # bool: in this round
  # of a device batch by its images, compilation not included
  seconds: np.ndarray

  @property
  def missing(self) -> float:
    """Share of the images of all rounds that have no score."""
    return float(np.isnan(self.score).mean())

  def design(self, images: np.ndarray) -> bootstrap.Design:
    """Returns how the given images (their numbers) were drawn: prompts, tag by tag."""
    return bootstrap.Design(
      *([labels[i] for i in images] for labels in (self.prompts, self.tags))
    )


def _rounds(
  samples: Sequence[dict], name: str, kind: type = float
) -> np.ndarray:
  return np.array(
    [[turn[name] for turn in sample["turns"]] for sample in samples], kind
  ).T


def of_samples(samples: Sequence[dict]) -> Result:
  """Collects samples as `samples.of_batch` makes them.

  Raises:
    ValueError: there are none.
  """
  if not samples:
    raise ValueError("an evaluation must have samples; there are none")
  parts = {
    name: np.array(
      [[turn["parts"][name] for turn in sample["turns"]] for sample in samples],
      float,
    ).T
    for name in samples[0]["turns"][0]["parts"]
  }
  return Result(
    tags=[sample["tag"] for sample in samples],
    prompts=[sample["prompt"] for sample in samples],
    score=_rounds(samples, "score"),
    parts=parts,
    stop=_rounds(samples, "stop", bool),
    format=_rounds(samples, "format"),
    tokens=_rounds(samples, "tokens"),
    instruction_tokens=_rounds(samples, "instruction_tokens"),
    chain=_rounds(samples, "chain_score"),
    says_stop=_rounds(samples, "says_stop", bool),
    seconds=_rounds(samples, "seconds"),
  )


def answers_of(samples: Sequence[dict]) -> Answers:
  """Collects the answers of samples."""
  every = [
    (sample, one) for sample in samples for one in sample.get("answers", ())
  ]
  of = lambda key: [one[key] for _, one in every]
  tags, prompts = (
    [sample[key] for sample, _ in every] for key in ("tag", "prompt")
  )
  return Answers(tags, prompts, of("kind"), of("expected"), of("answer"))

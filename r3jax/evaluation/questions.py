"""Understanding: questions about the model's own images, whose answers the reward knows.

Two forms, after the paper's: ITA-style (does the image match the prompt?) and VQA-style (existence,
count, colour, relation). They are called so because the paper's own question sets are not public.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import re

import numpy as np

from r3jax.evaluation import draw
from r3jax.sequence import thoughts
from r3jax.worlds import base as worlds_base

MATCH = "match"
_MATCH_QUESTION = "The description of the target image is: {prompt}\nDoes the provided image match it? Answer yes or no."


@dataclasses.dataclass(frozen=True)
class Question:
  """One question about one image, and the word that answers it."""

  kind: str
  question: str
  expected: str


@dataclasses.dataclass(frozen=True)
class Examiner:
  """Asks about drafts.

  Attributes:
    kinds: kinds of the questions about every image: MATCH, whose answer is the reward's part
      "strict", and those of the world.
    quiz: questions of the world whose verifier is the reward; without it only MATCH can be asked.
    seed: seed of the questions.
  """

  kinds: tuple[str, ...]
  quiz: worlds_base.Quiz | None
  seed: int

  def __post_init__(self):
    if set(self.kinds) - set(self.possible_kinds):
      raise ValueError(
        f"eval.ask must hold nothing but {self.possible_kinds} with this reward; got {self.kinds}"
      )

  @property
  def possible_kinds(self) -> tuple[str, ...]:
    """The kinds of questions that can be asked with this reward, MATCH first."""
    return (MATCH, *self.quiz.kinds) if self.quiz else (MATCH,)

  def number(self, kind: str) -> int:
    """Returns the place of a kind among all possible ones, from which its random draws come."""
    return self.possible_kinds.index(kind)

  def questions(
    self, drafts: draw.Drawn, records: Sequence[dict], rows: np.ndarray
  ) -> Mapping[str, list[Question | None]]:
    """Returns a question of every kind about every image, None where the image does not give one.

    Args:
      drafts: numpy, one row per image.
      records: of the prompts.
      rows: [B, 2] the numbers of prompt and image, from which the draws come.
    """
    objects = self.quiz.see(drafts.images) if self.quiz else [()] * len(records)
    match = [
      self._match(record, right, known)
      for record, right, known in zip(
        records, drafts.score.parts["strict"], drafts.score.valid
      )
    ]
    scene = lambda kind: [
      self._scene(kind, there, row) for there, row in zip(objects, rows)
    ]
    return {
      kind: match if kind == MATCH else scene(kind) for kind in self.kinds
    }

  def _match(self, record: dict, right: float, known: bool) -> Question | None:
    if not known:
      return None
    asked = (
      self.quiz.match(record["prompt"])
      if self.quiz
      else _MATCH_QUESTION.replace("{prompt}", record["prompt"])
    )
    return Question(MATCH, asked, "yes" if right == 1 else "no")

  def _scene(self, kind: str, objects, row: np.ndarray) -> Question | None:
    rng = np.random.default_rng([self.seed, *row.tolist(), self.number(kind)])
    asked = self.quiz.kinds[kind](objects, rng)
    return asked and Question(kind, *asked)


def answer_in(text: str) -> str:
  """Returns the word that a text answers with: the first behind the thought; "" where there is none."""
  words = (
    re.findall(r"[a-z0-9]+", thoughts.edit_instruction(text).lower())
    if thoughts.CLOSE in text
    else []
  )
  return words[0] if words else ""

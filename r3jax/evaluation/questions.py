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
from r3jax.worlds.shapes import grammar
from r3jax.worlds.shapes import quiz
from r3jax.worlds.shapes import readings

MATCH = "match"
KINDS = (MATCH, *quiz.KINDS)
YES_OR_NO = (MATCH, "existence", "relation")
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
    kinds: what is asked about every image, of KINDS.
    embedded: the exact verifier of the embedded world knows the answers, and its grammar asks;
      else only "match" can be asked, and the reward's part "strict" knows the answer.
    seed: of what is asked.
  """

  kinds: tuple[str, ...]
  embedded: bool
  seed: int

  def __post_init__(self):
    known = KINDS if self.embedded else (MATCH,)
    if set(self.kinds) - set(known):
      raise ValueError(
        f"eval.ask must hold nothing but {known} with this reward; got {self.kinds}"
      )

  def questions(
    self, drafts: draw.Drawn, records: Sequence[dict], rows: np.ndarray
  ) -> Mapping[str, list[Question | None]]:
    """Returns a question of every kind about every image, None where the image does not give one.

    Args:
      drafts: numpy, one row per image.
      records: of the prompts.
      rows: [B, 2] the numbers of prompt and image, from which the draws come.
    """
    objects = (
      readings.objects(drafts.images) if self.embedded else [()] * len(records)
    )
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
      grammar.match_question(record["prompt"])
      if self.embedded
      else _MATCH_QUESTION.replace("{prompt}", record["prompt"])
    )
    return Question(MATCH, asked, "yes" if right == 1 else "no")

  def _scene(self, kind: str, objects, row: np.ndarray) -> Question | None:
    rng = np.random.default_rng([self.seed, *row.tolist(), KINDS.index(kind)])
    asked = quiz.KINDS[kind](objects, rng)
    return asked and Question(kind, *asked)


def answer_in(text: str) -> str:
  """Returns the word that a text answers with: the first behind the thought; "" where there is none."""
  words = (
    re.findall(r"[a-z0-9]+", thoughts.edit_instruction(text).lower())
    if thoughts.CLOSE in text
    else []
  )
  return words[0] if words else ""

"""Measures understanding: questions about the model's own images, whose answers the reward knows.

There are two forms, after the paper's: ITA-style (does the image match the prompt?) and VQA-style
(existence, count, colour, relation). The suffix says that the paper's own questions are not public.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import re

import numpy as np

from r3jax.data import labelled_images
from r3jax.data import records
from r3jax.evaluation import chains
from r3jax.sequence import thoughts
from r3jax.worlds import base as worlds_base

MATCH = labelled_images.MATCH
_MATCH_QUESTION = (
  "The description of the target image is: {prompt}\n"
  "Does the provided image match it? Answer yes or no."
)


@dataclasses.dataclass(frozen=True)
class Question:
  """A question about one image.

  Attributes:
    kind: MATCH, or a kind of the world's quiz.
    text: The question.
    expected: Word that is the right answer.
  """

  kind: str
  text: str
  expected: str


@dataclasses.dataclass(frozen=True)
class Questionnaire:
  """Chooses questions about drafts.

  Attributes:
    kinds: Kinds of questions that every image gets: MATCH, whose answer is the reward's part
      "strict", and those of the quiz.
    quiz: Questions of the world whose verifier is the reward; without it only MATCH is possible.
    seed: Seed of the choice.

  Raises:
    ValueError: A kind is not possible.
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
    """Kinds of questions that are possible with this reward, MATCH first."""
    if self.quiz is None:
      return (MATCH,)
    return (MATCH, *self.quiz.kinds)

  def index_of(self, kind: str) -> int:
    """Returns the index of a kind among all possible ones; it is part of random seeds."""
    return self.possible_kinds.index(kind)

  def questions(
    self,
    drafts: chains.ScoredImages,
    prompts: Sequence[records.Prompt],
    rows: np.ndarray,
  ) -> Mapping[str, list[Question | None]]:
    """Returns one question of every kind about every image, None where the image gives none.

    Args:
      drafts: Images and scores in numpy.
      prompts: The prompts, one per image.
      rows: Indices of prompt and image, [B, 2], which seed the choice.
    """
    scenes = self.quiz.see(drafts.images) if self.quiz else []
    result = {}
    for kind in self.kinds:
      if kind == MATCH:
        result[kind] = self._match_questions(drafts, prompts)
      else:
        result[kind] = self._scene_questions(kind, scenes, rows)
    return result

  def _match_questions(
    self, drafts: chains.ScoredImages, prompts: Sequence[records.Prompt]
  ) -> list[Question | None]:
    """Asks whether images match their prompts; None where there is no score."""
    result = []
    strict = drafts.score.parts["strict"]
    for i, prompt in enumerate(prompts):
      if not drafts.score.valid[i]:
        result.append(None)
        continue
      text = match_question(prompt.text, self.quiz)
      expected = "yes" if strict[i] == 1 else "no"
      result.append(Question(MATCH, text, expected))
    return result

  def _scene_questions(
    self, kind: str, scenes: Sequence[worlds_base.Scene], rows: np.ndarray
  ) -> list[Question | None]:
    """Asks about what the world sees in each image."""
    result = []
    for scene, row in zip(scenes, rows, strict=True):
      seed = [self.seed, *row.tolist(), self.index_of(kind)]
      rng = np.random.default_rng(seed)
      question = self.quiz.kinds[kind](scene, rng)
      result.append(Question(kind, *question) if question else None)
    return result


def match_question(prompt: str, quiz: worlds_base.Quiz | None) -> str:
  """Returns the question whether an image matches a prompt, in the words of the quiz if given."""
  if quiz is not None:
    return quiz.match(prompt)
  return _MATCH_QUESTION.replace("{prompt}", prompt)


def answer_in(text: str) -> str:
  """Returns the first word after the thought, in lower case; "" if there is none."""
  if thoughts.CLOSE not in text:
    return ""
  reply = thoughts.edit_instruction(text).lower()
  word = re.search(r"[a-z0-9]+", reply)
  return word.group() if word else ""

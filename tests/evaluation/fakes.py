"""An evaluation without a model: all results follow from the indices of prompt and image."""

import numpy as np

from r3jax import types
from r3jax.agent import experience
from r3jax.evaluation import chains
from r3jax.evaluation import evaluate
from r3jax.evaluation import questions
from r3jax.worlds.shapes import prompts as prompts_lib
from r3jax.worlds.shapes import world

RECORDS = tuple(prompts_lib.heldout_records()[::31][:10])
TEXTS = (
  "<think> plan </think>",
  "<think> ok </think> no further edit needed",
  "<think> smudge </think> remove the smudge at top",
)


class Sampler:
  """Draws two rounds; the second stops where prompt + image is even.

  Attributes:
    calls: rows of every batch.
    fails_at: the batch before which the power goes off.
    missing: (prompt, image) that has no score the first time.
    missing_behind_stop: (prompt, image) whose chain has no score after its stop.
    never_stop: as the real one's.
  """

  question_tokens, rounds, seed = 8, 2, 0

  def __init__(
    self,
    batch_size: int = 3,
    fails_at: int | None = None,
    missing: tuple[int, int] | None = None,
    missing_behind_stop: tuple[int, int] | None = None,
    never_stop: bool = True,
  ):
    self.batch_size, self.fails_at, self.missing, self.calls = (
      batch_size,
      fails_at,
      missing,
      [],
    )
    self.missing_behind_stop = missing_behind_stop
    self.never_stop = never_stop

  def run(
    self,
    policy,
    towers,
    prompts: experience.Prompts,
    images: np.ndarray,
    count: int,
  ):
    del policy, towers, count
    if len(self.calls) == self.fails_at:
      raise KeyboardInterrupt
    rows = np.stack([prompts.index, images], 1)
    self.calls.append(rows.tolist())
    draft = self._drawn(rows, 0)
    even = rows.sum(1) % 2 == 0
    open_ = np.zeros(len(rows), bool)

    def text(which):
      ids = np.tile(which, (5, 1)).T
      return experience.Text(ids, np.full(len(rows), 5), None)

    first = chains.Round(
      chains.ChainState(draft, draft if self.never_stop else None, open_),
      np.ones(len(rows)),
      open_,
      text(np.zeros(len(rows), int)),
      np.zeros(len(rows), int),
    )
    chain = self._drawn(rows, 1)

    def keep(old, new):
      return np.where(even.reshape(-1, *[1] * (new.ndim - 1)), old, new)

    score = types.Score(
      *(
        keep(getattr(draft.score, name), getattr(chain.score, name))
        for name in ("value", "valid")
      ),
      {
        name: keep(draft.score.parts[name], chain.score.parts[name])
        for name in draft.score.parts
      },
    )
    kept = chains.ScoredImages(keep(draft.images, chain.images), score)
    if self.missing_behind_stop:
      chain.score.valid[:] &= (rows != self.missing_behind_stop).any(1)
    second = chains.Round(
      chains.ChainState(kept, chain if self.never_stop else None, even),
      np.ones(len(rows)),
      even,
      text(np.where(even, 1, 2)),
      np.full(len(rows), 3),
    )
    return [
      chains.TimedRound(first, 0.5 * len(rows)),
      chains.TimedRound(second, 1.0 * len(rows)),
    ]

  def _drawn(self, rows: np.ndarray, turn: int) -> chains.ScoredImages:
    value = (rows[:, 0] % 3) / 4 + 0.25 * turn
    images = np.broadcast_to(
      (rows.sum(1) * 10 + turn)[:, None, None, None], (len(rows), 48, 48, 3)
    ).astype(np.uint8)
    missing = (
      (rows == self.missing).all(1)
      if self.missing and len(self.calls) <= 4
      else np.zeros(len(rows), bool)
    )
    return chains.ScoredImages(
      images,
      types.Score(
        value,
        ~missing,
        {
          "strict": (value == 1).astype(float),
          "correct": (value >= 0.75).astype(float),
        },
      ),
    )

  def ask(
    self, policy, towers, prompts, images, number: int, pictures: np.ndarray
  ):
    del policy, towers, images, number
    assert pictures.shape == (self.batch_size, 48, 48, 3)
    return experience.Text(prompts.question, prompts.question_length, None)


def evaluation(sampler: Sampler, **settings) -> evaluate.Evaluation:
  """Returns an evaluation of ten prompts, two images each; every question is answered "no"."""
  index = np.arange(len(RECORDS), dtype=np.int32)
  ids = np.zeros((len(RECORDS), 5), np.int32)
  prompts = experience.Prompts(ids, ids[:, 0], ids, ids[:, 0], None, index)

  def decode(ids, lengths):
    del lengths
    return [
      TEXTS[row[0]] if row[0] < len(TEXTS) else "<think> </think> no"
      for row in ids
    ]

  return evaluate.Evaluation(
    sampler=sampler,
    records=RECORDS,
    prompts=prompts,
    images_per_prompt=2,
    questionnaire=questions.Questionnaire(("match",), world.WORLD.quiz, seed=0),
    segments=lambda texts, capacity: (
      np.full((len(texts), capacity), 99),
      np.full(len(texts), capacity),
    ),
    decode=decode,
    boxes=None,
    flush=lambda: None,
    flops=(1e12, 2e12),
    settings={"points": 4} | settings,
  )

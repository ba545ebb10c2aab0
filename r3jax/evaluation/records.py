"""Samples of an evaluation as they are kept: one JSON object per image of a prompt, and PNGs.

They are what the report page shows (`io/report.py`), what a result is made of (`result.py`), and what
an interrupted evaluation goes on from.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses

import numpy as np

from r3jax.evaluation import draw
from r3jax.evaluation import questions
from r3jax.rewards import outcome
from r3jax.sequence import thoughts

Boxes = Callable[[np.ndarray], list[list[dict]]]


@dataclasses.dataclass(frozen=True)
class Batch:
  """A batch that was drawn, numpy; padding is still in it.

  Attributes:
    step: iteration of the policy.
    rows: [B, 2] numbers of prompt and image.
    records: of the prompts.
    rounds: as `Evaluator.run` returns them.
    asked: kind -> what was asked about the drafts, None where nothing was.
    answers: kind -> the texts in reply.
  """

  step: int
  rows: np.ndarray
  records: Sequence[dict]
  rounds: Sequence[tuple[draw.Round, float]]
  asked: Mapping[str, Sequence[questions.Question | None]]
  answers: Mapping[str, Sequence[str]]


def key_of(prompt: int, image: int) -> str:
  """Returns the name of a sample by the numbers of its prompt and image."""
  return f"{prompt:05d}_{image:02d}"


def of_batch(
  batch: Batch,
  number: int,
  decode: Callable[[np.ndarray, np.ndarray], list[str]],
  boxes: Boxes | None,
) -> tuple[list[dict], dict[str, np.ndarray]]:
  """Returns the first `number` samples of a batch, and their images by path.

  Args:
    batch: what was drawn.
    number: how many of its rows are not padding.
    decode: (ids [B, T], lengths [B]) -> texts.
    boxes: what the reward sees in images, if it can tell.
  """
  texts = [decode(one.text.ids, one.text.lengths) for one, _ in batch.rounds]
  seen = [boxes(one.kept.images) if boxes else None for one, _ in batch.rounds]
  samples, images = [], {}
  for i in range(number):
    key, turns = key_of(*batch.rows[i].tolist()), []
    for turn, (one, seconds) in enumerate(batch.rounds):
      if one.stop[i]:
        path = turns[-1]["image"]
      else:
        path = f"images/{key}_{turn}.png"
        images[path] = one.kept.images[i]
      facts = _turn(one, i) | {
        "image": path,
        "seconds": seconds / len(batch.rows),
      }
      said = _said(
        one, i, texts[turn][i], turn, finished=turn > 0 and turns[-1]["stop"]
      )
      turns.append(facts | said | ({"boxes": seen[turn][i]} if boxes else {}))
    record = batch.records[i]
    samples.append(
      {
        "step": batch.step,
        "key": key,
        "prompt": record["prompt"],
        "tag": record["tag"],
        "turns": turns,
        "answers": [
          _answer(asked[i], batch.answers[kind][i])
          for kind, asked in batch.asked.items()
          if asked[i]
        ],
      }
    )
  return samples, images


def _turn(one: draw.Round, i: int) -> dict:
  """Returns the numbers of one round of one image; None stands for a missing score."""
  return outcome.as_json(one.kept.score, i) | {
    "chain_score": outcome.as_json(one.chain.score, i)["score"],
    "format": float(one.format[i]),
    "stop": bool(one.stop[i]),
    "says_stop": bool(one.says_stop[i]),
  }


def _said(
  one: draw.Round, i: int, text: str, turn: int, finished: bool
) -> dict:
  """Returns the texts of a round and their lengths; what the chain of a finished sample says is kept apart."""
  if finished:
    return {
      "text": "",
      "instruction": "",
      "tokens": 0,
      "instruction_tokens": 0,
      "chain_text": text,
    }
  lengths = {
    "tokens": int(one.text.lengths[i]),
    "instruction_tokens": int(one.instruction_tokens[i]),
  }
  return {
    "text": text,
    "instruction": thoughts.edit_instruction(text) if turn else "",
  } | lengths


def _answer(asked: questions.Question, text: str) -> dict:
  return dataclasses.asdict(asked) | {
    "answer": questions.answer_in(text),
    "text": text,
  }

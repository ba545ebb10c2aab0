"""What the host adds to an iteration's metrics, and the pictures of it.

The compiled step knows neither tags nor learning rates. What is read here are a few numbers per
sample, never images.
"""

import collections
from collections.abc import Mapping, Sequence

import numpy as np

from r3jax.parallel import multihost
from r3jax.rl import iteration
from r3jax.rl import train_state
from r3jax.run import setup
from r3jax.run.logging import sinks

_GAP = 4  # pixels between two images of a picture


def metrics(
  experiment: setup.Experiment,
  state: train_state.TrainState,
  rows: np.ndarray,
  samples: iteration.Samples,
) -> dict[str, float]:
  """Returns scores by tag, and where the optimizer is. Every process must call it at the same point.

  Args:
    experiment: the run's constants.
    state: after the iteration.
    rows: [G] which training records the iteration's prompts are.
    samples: of the iteration; scores by tag are those of the last edit round.
  """
  settings, tags = (
    experiment.settings,
    np.array([experiment.train[row]["tag"] for row in rows]),
  )
  found = _optimizer(
    experiment.optimizer,
    int(multihost.fetch(train_state.updates_done(state.opt_state))),
  )
  drafts, edits, score = samples.draft_score, samples.edits, samples.edit_score
  found |= by_tag(
    "reason",
    np.repeat(tags, settings.group_size),
    *multihost.fetch((drafts.value, drafts.valid)),
  )
  if edits is not None:
    row, value, valid, before_valid = multihost.fetch(
      (edits.row, score.value, score.valid, edits.before_valid)
    )
    stage = iteration.numbered("edit", settings.num_reflect_rounds - 1)
    found |= by_tag(stage, tags[row], value, valid & before_valid)
  return found


def by_tag(
  stage: str, tags: np.ndarray, score: np.ndarray, valid: np.ndarray
) -> dict[str, float]:
  """Returns the mean score of every tag that has one, by "STAGE/tag/TAG".

  Args:
    stage: prefix of the names.
    tags: [B] of what each image was made for.
    score: [B].
    valid: [B] whether the score is there.
  """
  return {
    f"{stage}/tag/{tag}": float(np.mean(score[valid & (tags == tag)]))
    for tag in np.unique(tags[valid])
  }


def _optimizer(
  settings: train_state.OptimizerSettings, updates: int
) -> dict[str, float]:
  """Returns the number of updates done, and the learning rates of the last of them."""
  rate = lambda full: float(
    train_state.learning_rate(
      full, settings.warmup_updates, max(updates - 1, 0)
    )
  )
  return {
    "optimizer/updates": float(updates),
    "optimizer/learning_rate_und": 0.0
    if settings.freeze_und
    else rate(settings.und_learning_rate),
    "optimizer/learning_rate_gen": rate(settings.gen_learning_rate),
  }


def pictures(
  samples: Sequence[dict], images: Mapping[str, np.ndarray]
) -> dict[str, sinks.Picture]:
  """Returns samples as pictures, by "reason/sample/N" (a draft) and "edit/sample/N" (before and after an edit).

  Args:
    samples: of the report, see `io/report.py`.
    images: uint8 [H, W, 3] by the paths that the samples name.
  """
  found, counts = {}, collections.Counter()
  for sample in samples:
    turns = sample["turns"]
    stage = "reason" if len(turns) == 1 else "edit"
    counts[stage] += 1
    picture = sinks.Picture(
      _side_by_side([images[turn["image"]] for turn in turns]), _caption(sample)
    )
    found[f"{stage}/sample/{counts[stage]}"] = picture
  return found


def _side_by_side(images: Sequence[np.ndarray]) -> np.ndarray:
  """Returns images of one size in one, uint8 [H, W, 3]."""
  gap = np.full((images[0].shape[0], _GAP, 3), 255, np.uint8)
  return np.concatenate(
    [images[0], *(part for image in images[1:] for part in (gap, image))],
    axis=1,
  )


def _caption(sample: dict) -> str:
  score = lambda turn: (
    "missing" if turn["score"] is None else f"{turn['score']:.2f}"
  )
  first, *edits = sample["turns"]
  edited = "".join(
    f" -> {score(turn)} ({turn['instruction']})" for turn in edits
  )
  return f"{sample['prompt']} [{sample['tag']}]: {score(first)}{edited}"

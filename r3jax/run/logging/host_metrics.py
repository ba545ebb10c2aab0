"""Computes the metrics that need what only the host knows: tags of prompts and learning rates.

They read a few numbers per sample, never images.
"""

import numpy as np

from r3jax.parallel import multihost
from r3jax.rl import iteration
from r3jax.rl import stage_outputs
from r3jax.rl import train_state
from r3jax.run import setup


def compute(
  experiment: setup.Experiment,
  state: train_state.TrainState,
  indices: np.ndarray,
  samples: stage_outputs.Samples,
) -> dict[str, float]:
  """Returns an iteration's mean scores by tag, its learning rates and its number of updates.

  Every process must call it at the same point, because it gathers scores from all processes.

  Args:
    experiment: Training records, settings and optimizer of the run.
    state: State after the iteration.
    indices: [G] indices of the iteration's training records.
    samples: Samples of the iteration; its edits are those of the last round.
  """
  settings = experiment.settings
  tags = np.array([experiment.train[index].tag for index in indices])
  updates = int(multihost.fetch(train_state.updates_done(state.opt_state)))
  metrics = _learning_rates(experiment.optimizer, updates)

  draft_score = samples.draft_score
  value, valid = multihost.fetch((draft_score.value, draft_score.valid))
  draft_tags = np.repeat(tags, settings.group_size)
  metrics |= by_tag("reason", draft_tags, value, valid)

  edits = samples.edits
  edit_score = samples.edit_score
  if edits is not None:
    prompt_index, value, valid, before_valid = multihost.fetch(
      (
        edits.prompt_index,
        edit_score.value,
        edit_score.valid,
        edits.valid_before,
      )
    )
    stage = iteration.numbered("edit", settings.num_reflect_rounds - 1)
    # As in the metrics of the stage, an edit counts if its source has a score too.
    metrics |= by_tag(stage, tags[prompt_index], value, valid & before_valid)
  return metrics


def by_tag(
  stage: str, tags: np.ndarray, score: np.ndarray, valid: np.ndarray
) -> dict[str, float]:
  """Returns the mean score of every tag that has valid scores, by "STAGE/tag/TAG".

  Args:
    stage: Prefix of the names.
    tags: [B] tags of the prompts that the images were drawn for.
    score: [B] scores.
    valid: [B] bool; False where the score is missing.
  """
  return {
    f"{stage}/tag/{tag}": float(np.mean(score[valid & (tags == tag)]))
    for tag in np.unique(tags[valid])
  }


def _learning_rates(
  settings: train_state.OptimizerSettings, updates: int
) -> dict[str, float]:
  """Returns the number of updates done, and the learning rates of the last one."""
  last_update = max(updates - 1, 0)

  def warmed_up(rate: float) -> float:
    warmup = settings.warmup_updates
    return float(train_state.learning_rate(rate, warmup, last_update))

  und_rate = 0.0
  if not settings.freeze_und:
    und_rate = warmed_up(settings.und_learning_rate)
  return {
    "optimizer/updates": float(updates),
    "optimizer/learning_rate_und": und_rate,
    "optimizer/learning_rate_gen": warmed_up(settings.gen_learning_rate),
  }

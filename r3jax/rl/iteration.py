"""One R3 iteration: reason -> update -> pool -> reflect and refine -> update.

`run` is the algorithm, one line per stage (docs/algorithm.md#stages; R3, arXiv 2602.15772). It runs
on anything that has the stages: `replica_stages.ReplicaStages` inside one mapped program, or the
separate programs of `mapped.split`.
"""

import dataclasses
from typing import Protocol

import jax

from r3jax import types
from r3jax.agent import experience
from r3jax.agent import random_keys
from r3jax.rl import diagnostics
from r3jax.rl import iteration_settings
from r3jax.rl import pools
from r3jax.rl import stage_outputs
from r3jax.rl import train_state


class Stages(Protocol):
  """The stages of an iteration."""

  @property
  def settings(self) -> iteration_settings.IterationSettings:
    """What the iteration learns from, and how."""
    ...

  def draft(
    self,
    state: train_state.TrainState,
    frozen: train_state.Frozen,
    prompts: experience.Prompts,
    key: types.Key,
    /,
  ) -> stage_outputs.Drafts:
    """Thinks about the G prompts and drafts images, `group_size` times each."""
    ...

  def score_drafts(self, drafts: stage_outputs.Drafts, /) -> types.Score:
    """Scores the drafts."""
    ...

  def learn_to_reason(
    self,
    state: train_state.TrainState,
    frozen: train_state.Frozen,
    drafts: stage_outputs.Drafts,
    score: types.Score,
    /,
  ) -> tuple[train_state.TrainState, diagnostics.Metrics]:
    """Updates the policy on the reason stage."""
    ...

  def pool(
    self, drafts: stage_outputs.Drafts, score: types.Score, /
  ) -> pools.Pool:
    """Gathers the drafts of all replicas with their scores."""
    ...

  def edit(
    self,
    state: train_state.TrainState,
    frozen: train_state.Frozen,
    prompts: experience.Prompts,
    pool: pools.Pool,
    key: types.Key,
    turn: int,
    /,
  ) -> stage_outputs.Edits:
    """Draws a source image for every group, reflects on it and refines it."""
    ...

  def score_edits(self, edits: stage_outputs.Edits, /) -> types.Score:
    """Scores the edits; an image that was not edited keeps its score."""
    ...

  def learn_to_edit(
    self,
    state: train_state.TrainState,
    frozen: train_state.Frozen,
    edits: stage_outputs.Edits,
    score: types.Score,
    /,
  ) -> tuple[train_state.TrainState, diagnostics.Metrics]:
    """Updates the policy on the reflect and refine stages."""
    ...

  def pool_again(
    self, edits: stage_outputs.Edits, score: types.Score, /
  ) -> pools.Pool:
    """Gathers the edits of all replicas with their scores, for a further round."""
    ...


def run(
  stages: Stages,
  state: train_state.TrainState,
  frozen: train_state.Frozen,
  prompts: experience.Prompts,
  seed: jax.typing.ArrayLike,
) -> tuple[train_state.TrainState, diagnostics.Metrics, stage_outputs.Samples]:
  """Runs one iteration.

  Args:
    stages: the stages, mapped over replicas or not.
    state: what training has changed so far.
    frozen: parameters that training does not change.
    prompts: the iteration's prompts, one row per group.
    seed: uint32 seed of training; with `state.step` it determines all
      randomness.

  Returns:
    The new state, metrics, and samples (the edits are those of the last round).
  """
  # The key depends on the iteration alone: a resumed run draws what an uninterrupted one draws.
  key = random_keys.iteration_key(seed, state.step)

  # Think about the prompts, draw drafts, learn from their rewards.
  drafts = stages.draft(state, frozen, prompts, key)
  draft_score = stages.score_drafts(drafts)
  state, metrics = stages.learn_to_reason(state, frozen, drafts, draft_score)
  metrics = _prefixed("reason", metrics)
  pool = stages.pool(drafts, draft_score)

  # Look at images of the pool, edit them, learn from how much better they have become.
  edits = None
  edit_score = None
  for turn in range(stages.settings.num_reflect_rounds):
    metrics |= _prefixed(numbered("pool", turn), diagnostics.pool(pool))
    # The policy that edits has already learned from the drafts.
    edits = stages.edit(state, frozen, prompts, pool, key, turn)
    edit_score = stages.score_edits(edits)
    state, edit_metrics = stages.learn_to_edit(state, frozen, edits, edit_score)
    metrics |= _prefixed(numbered("edit", turn), edit_metrics)
    # The reference draws every round's source from the drafts; we draw from the round before.
    pool = stages.pool_again(edits, edit_score)

  state = dataclasses.replace(state, step=state.step + 1)
  samples = stage_outputs.Samples(drafts, draft_score, edits, edit_score)
  return state, metrics, samples


def numbered(stage: str, turn: int) -> str:
  """Returns the heading of a round's metrics: edit, edit2, edit3, ..."""
  return stage if turn == 0 else f"{stage}{turn + 1}"


def _prefixed(
  heading: str, metrics: diagnostics.Metrics
) -> diagnostics.Metrics:
  """Puts metrics under a heading; mismatches have a heading of their own, `mismatch`."""
  prefixed = {}
  for name, value in metrics.items():
    if name.startswith("mismatch_"):
      modality = name.removeprefix("mismatch_")
      prefixed[f"mismatch/{heading}_{modality}"] = value
    else:
      prefixed[f"{heading}/{name}"] = value
  return prefixed

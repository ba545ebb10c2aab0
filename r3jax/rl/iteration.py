"""One R3 iteration: reason -> update -> pool -> reflect and refine -> update.

`tree` is the algorithm, one line per stage (docs/algorithm.md#stages; R3, arXiv 2602.15772), and
`full_chain` what R3 compares it with (docs/algorithm.md#full-chain). Both run on anything that has
the stages: `replica_stages.ReplicaStages` inside one mapped program, or the separate programs of
`mapped.split`.
"""

from collections.abc import Sequence
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

  def pool(self, images: pools.ScoredImages, /) -> pools.ScoredImages:
    """Gathers the images of a stage from all replicas."""
    ...

  def draw(
    self, pool: pools.ScoredImages, key: types.Key, turn: int, /
  ) -> pools.ScoredImages:
    """Draws a source image from the pool for every group."""
    ...

  def edit(
    self,
    state: train_state.TrainState,
    frozen: train_state.Frozen,
    prompts: experience.Prompts,
    sources: pools.ScoredImages,
    key: types.Key,
    turn: int,
    /,
  ) -> stage_outputs.Edits:
    """Reflects on source images and refines them, with `group_size` samples per group."""
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

  def learn_from_chain(
    self,
    state: train_state.TrainState,
    frozen: train_state.Frozen,
    drafts: stage_outputs.Drafts,
    draft_score: types.Score,
    rounds: Sequence[tuple[stage_outputs.Edits, types.Score]],
    /,
  ) -> tuple[
    train_state.TrainState, Sequence[diagnostics.Metrics], diagnostics.Metrics
  ]:
    """Updates the policy once, on all stages of the full chain.

    The metrics are those of every stage (reason, then edits round by round), and of the update.
    """
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
  iterate = full_chain if stages.settings.chain == "full" else tree
  state, metrics, samples = iterate(stages, state, frozen, prompts, key)
  return dataclasses.replace(state, step=state.step + 1), metrics, samples


def tree(
  stages: Stages,
  state: train_state.TrainState,
  frozen: train_state.Frozen,
  prompts: experience.Prompts,
  key: types.Key,
) -> tuple[train_state.TrainState, diagnostics.Metrics, stage_outputs.Samples]:
  """Runs R3's Tree-RL: groups edit images of a pool, and every stage has its own update."""
  # Think about the prompts, draw drafts, learn from their rewards.
  drafts = stages.draft(state, frozen, prompts, key)
  draft_score = stages.score_drafts(drafts)
  state, metrics = stages.learn_to_reason(state, frozen, drafts, draft_score)
  metrics = _prefixed("reason", metrics)
  pool = stages.pool(stage_outputs.scored_drafts(drafts, draft_score))

  # Look at images of the pool, edit them, learn from how much better they have become.
  edits = None
  edit_score = None
  num_rounds = stages.settings.num_reflect_rounds
  for turn in range(num_rounds):
    metrics |= _prefixed(numbered("pool", turn), diagnostics.pool(pool))
    sources = stages.draw(pool, key, turn)
    # The policy that edits has already learned from the drafts.
    edits = stages.edit(state, frozen, prompts, sources, key, turn)
    edit_score = stages.score_edits(edits)
    state, edit_metrics = stages.learn_to_edit(state, frozen, edits, edit_score)
    metrics |= _prefixed(numbered("edit", turn), edit_metrics)
    # The reference draws the sources of every round from the drafts.
    if stages.settings.pool_source == "edits" and turn + 1 < num_rounds:
      pool = stages.pool(stage_outputs.scored_edits(edits, edit_score))

  samples = stage_outputs.Samples(drafts, draft_score, edits, edit_score)
  return state, metrics, samples


def full_chain(
  stages: Stages,
  state: train_state.TrainState,
  frozen: train_state.Frozen,
  prompts: experience.Prompts,
  key: types.Key,
) -> tuple[train_state.TrainState, diagnostics.Metrics, stage_outputs.Samples]:
  """Runs whole chains: every sample edits its own image, and one update follows all stages."""
  # Think about the prompts and draw drafts.
  drafts = stages.draft(state, frozen, prompts, key)
  draft_score = stages.score_drafts(drafts)
  images = stage_outputs.scored_drafts(drafts, draft_score)

  # Look at each image and edit it, by the policy that drew the drafts.
  edits = None
  edit_score = None
  rounds = []
  for turn in range(stages.settings.num_reflect_rounds):
    edits = stages.edit(state, frozen, prompts, images, key, turn)
    edit_score = stages.score_edits(edits)
    rounds.append((edits, edit_score))
    images = stage_outputs.scored_edits(edits, edit_score)

  # Learn from all stages together.
  state, by_stage, update_metrics = stages.learn_from_chain(
    state, frozen, drafts, draft_score, rounds
  )
  metrics = _prefixed("chain", update_metrics)
  headings = [
    "reason",
    *(numbered("edit", turn) for turn in range(len(rounds))),
  ]
  for heading, stage_metrics in zip(headings, by_stage, strict=True):
    metrics |= _prefixed(heading, stage_metrics)

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

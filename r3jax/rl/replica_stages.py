"""The stages of an iteration as one replica computes them.

The methods run inside a program that is mapped over the `data` axis, see `mapped.py`: rows of
samples are this replica's, statistics and updates are over all replicas.
"""

from collections.abc import Sequence
import dataclasses

import jax
import jax.numpy as jnp
import optax

from r3jax import types
from r3jax.agent import actors
from r3jax.agent import experience
from r3jax.agent import random_keys
from r3jax.agent import rollout
from r3jax.agent import rollout_settings
from r3jax.agent import scoring
from r3jax.parallel import collectives
from r3jax.rl import diagnostics
from r3jax.rl import group_table
from r3jax.rl import iteration_settings
from r3jax.rl import objective
from r3jax.rl import placement
from r3jax.rl import pools
from r3jax.rl import returns
from r3jax.rl import stage_outputs
from r3jax.rl import train_state
from r3jax.rl import update
from r3jax.sequence import thoughts


def instruction_of(parsed: thoughts.Parsed) -> experience.Instruction:
  """Returns the instructions that a parser reads in reflections."""
  # In a compiled program the parser returns JAX arrays, and these conversions do nothing.
  return experience.Instruction(
    ids=jnp.asarray(parsed.instruction),
    lengths=jnp.asarray(parsed.instruction_length),
    stop=jnp.asarray(parsed.stop),
  )


@dataclasses.dataclass(frozen=True)
class ReplicaStages:
  """The stages of an iteration on one replica; see `iteration.Stages`.

  Attributes:
    modules: the model.
    rollout: how the model samples.
    settings: what an iteration learns from, and how.
    reward: scores images.
    parse: reads tags and instructions from sampled text.
    optimizer: changes the policy.
    num_replicas: size of the mapped axis.
  """

  modules: actors.Modules
  rollout: rollout_settings.RolloutSettings
  settings: iteration_settings.IterationSettings
  reward: types.Scoring
  parse: thoughts.Parse
  optimizer: optax.GradientTransformation
  num_replicas: int

  @property
  def place(self) -> placement.Placement:
    """This replica's share of groups and samples."""
    return placement.Placement(
      self.settings.num_groups, self.settings.group_size, self.num_replicas
    )

  # --- Reason ------------------------------------------------------------------------------------

  @jax.named_scope("reason")
  def draft(
    self,
    state: train_state.TrainState,
    frozen: train_state.Frozen,
    prompts: experience.Prompts,
    key: types.Key,
  ) -> stage_outputs.Drafts:
    """Thinks about this replica's prompts and drafts images."""
    actor = self.sampling_actor(state, frozen)
    keys = self.place.keys(key, "reason")
    # Every replica gets all prompts and keeps those of its groups.
    local_prompts = self.place.local_prompts(prompts)
    reason = rollout.reason(actor, local_prompts, keys)
    return self.drafts(local_prompts, reason)

  @jax.named_scope("score")
  def score_drafts(self, drafts: stage_outputs.Drafts) -> types.Score:
    """Scores the drafts."""
    # Targets have a row per group, images one per sample.
    target = self.place.repeat(drafts.prompts.target)
    # The image of a sample that is not finite is black, and must not be scored as if drawn so.
    is_finite = drafts.rollout.is_finite
    score = self.reward(drafts.rollout.images, target, is_finite)
    return score.only_where(is_finite)

  @jax.named_scope("update")
  def learn_to_reason(
    self,
    state: train_state.TrainState,
    frozen: train_state.Frozen,
    drafts: stage_outputs.Drafts,
    score: types.Score,
  ) -> tuple[train_state.TrainState, diagnostics.Metrics]:
    """Updates the policy on the reason stage."""
    gradient, metrics = self._reason_gradient(state, frozen, drafts, score)
    return self._step(state, gradient), metrics

  # --- Pool --------------------------------------------------------------------------------------

  @jax.named_scope("pool")
  def pool(self, images: pools.ScoredImages) -> pools.ScoredImages:
    """Gathers the images of all replicas."""
    return self.place.gather(images)

  def draw(
    self, pool: pools.ScoredImages, key: types.Key, turn: int
  ) -> pools.ScoredImages:
    """Draws a source image from the pool for each of this replica's groups."""
    group_keys = self.place.keys(key, "reflect", turn).group

    def draw_index(group_key: types.Key) -> jax.Array:
      # The group's key itself belongs to its flow noise.
      draw_key = jax.random.fold_in(group_key, 0)
      return pools.draw(
        draw_key, pool.reward, pool.valid, self.settings.pool_perfect
      )

    drawn = jax.vmap(draw_index)(group_keys)
    return jax.tree.map(lambda x: x[drawn], pool)

  # --- Reflect and refine ------------------------------------------------------------------------

  def edit(
    self,
    state: train_state.TrainState,
    frozen: train_state.Frozen,
    prompts: experience.Prompts,
    sources: pools.ScoredImages,
    key: types.Key,
    turn: int,
  ) -> stage_outputs.Edits:
    """Reflects on source images, one per group or per sample, and refines them."""
    actor = self.sampling_actor(state, frozen)
    num_sources = sources.reward.shape[0]
    reflect_keys = self.edit_keys(key, "reflect", turn, num_sources)
    refine_keys = self.edit_keys(key, "refine", turn, num_sources)

    # Every source with the prompt that it was made for.
    source_prompts = jax.tree.map(lambda x: x[sources.prompt_index], prompts)
    source = rollout.look(actor, sources.images)

    # Samples that look at the same image differ in what they ask for.
    text = rollout.reflect(actor, source_prompts, source, reflect_keys)
    parsed = self.parse(text.ids, text.lengths, "reflect")
    instruction = instruction_of(parsed)
    refined = rollout.refine(actor, source, instruction, refine_keys)
    return self.edits(sources, source_prompts, source, text, parsed, refined)

  @jax.named_scope("score")
  def score_edits(self, edits: stage_outputs.Edits) -> types.Score:
    """Scores the edits; an image that was not edited keeps its score."""
    target = self.place.repeat(edits.prompts.target)
    stop = edits.instruction.stop
    is_finite = edits.refined.is_finite
    score = self.reward(edits.refined.images, target, ~stop & is_finite)
    score = score.only_where(is_finite)
    # A judge may score the same image differently; stopping must not pay by luck.
    before = types.Score(
      edits.reward_before, edits.valid_before, edits.parts_before
    )
    return jax.tree.map(
      lambda old, new: jnp.where(stop, old, new), before, score
    )

  @jax.named_scope("update")
  def learn_to_edit(
    self,
    state: train_state.TrainState,
    frozen: train_state.Frozen,
    edits: stage_outputs.Edits,
    score: types.Score,
  ) -> tuple[train_state.TrainState, diagnostics.Metrics]:
    """Updates the policy on the reflect and refine stages."""
    gradient, metrics = self._edit_gradient(state, frozen, edits, score)
    return self._step(state, gradient), metrics

  # --- Full chain --------------------------------------------------------------------------------

  @jax.named_scope("update")
  def learn_from_chain(
    self,
    state: train_state.TrainState,
    frozen: train_state.Frozen,
    drafts: stage_outputs.Drafts,
    draft_score: types.Score,
    rounds: Sequence[tuple[stage_outputs.Edits, types.Score]],
  ) -> tuple[
    train_state.TrainState, Sequence[diagnostics.Metrics], diagnostics.Metrics
  ]:
    """Updates the policy once, on the sum of the losses of all stages."""
    gradient, metrics = self._reason_gradient(
      state, frozen, drafts, draft_score
    )
    by_stage = [metrics]
    for edits, score in rounds:
      edit_gradient, metrics = self._edit_gradient(state, frozen, edits, score)
      gradient = jax.tree.map(jnp.add, gradient, edit_gradient)
      by_stage.append(metrics)
    total = {"loss": gradient.loss} | diagnostics.gradient_norms(
      gradient.gradients
    )
    # Parts that are finite may add up to more than float32 holds.
    num_nonfinite = gradient.num_nonfinite + diagnostics.num_nonfinite(total)
    gradient = dataclasses.replace(gradient, num_nonfinite=num_nonfinite)
    total["skipped"] = diagnostics.skipped(num_nonfinite)
    return self._step(state, gradient), by_stage, total

  # --- Parts of the stages -----------------------------------------------------------------------

  def drafts(
    self, prompts: experience.Prompts, reason: experience.Reason
  ) -> stage_outputs.Drafts:
    """Returns what the reason stage hands on, given this replica's prompts and rollout."""
    parsed = self.parse(reason.text.ids, reason.text.lengths, "reason")
    format_reward = jnp.asarray(parsed.format)
    # The groups of the reason stage are the iteration's prompts, in order.
    prompt_index = self.place.row_ids() // self.settings.group_size
    return stage_outputs.Drafts(reason, prompts, format_reward, prompt_index)

  def edits(
    self,
    sources: pools.ScoredImages,
    prompts: experience.Prompts,
    source: experience.Source,
    text: experience.Text,
    parsed: thoughts.Parsed,
    refined: experience.Refine,
  ) -> stage_outputs.Edits:
    """Returns what the reflect and refine stages hand on.

    Args:
      sources: images that are edited, with their scores.
      prompts: what they were made for.
      source: the same images as the stages read them.
      text: reflections.
      parsed: what the parser reads in them.
      refined: edited images.
    """
    return stage_outputs.Edits(
      text=text,
      format_reward=jnp.asarray(parsed.format),
      instruction=instruction_of(parsed),
      truncated=jnp.asarray(parsed.truncated),
      refined=refined,
      prompts=prompts,
      source=source,
      reward_before=self.place.repeat(sources.reward),
      valid_before=self.place.repeat(sources.valid),
      parts_before=self.place.repeat(sources.parts),
      prompt_index=self.place.repeat(sources.prompt_index),
    )

  def _actor(
    self, policy: types.Params, frozen: train_state.Frozen
  ) -> actors.Actor:
    """Returns the actor that scores recorded samples and is differentiated."""
    return actors.Actor(
      self.modules, frozen.whole(policy), frozen.towers, self.rollout
    )

  def sampling_actor(
    self, state: train_state.TrainState, frozen: train_state.Frozen
  ) -> actors.Actor:
    """Returns the actor of rollouts."""
    policy = frozen.whole(state.policy)
    return actors.sampler(self.modules, policy, frozen.towers, self.rollout)

  def edit_keys(
    self, key: types.Key, stage: str, turn: int, num_sources: int
  ) -> random_keys.Keys:
    """Returns the keys of an edit stage, with a row per source in place of one per group."""
    keys = self.place.keys(key, stage, turn)
    # Sources of one group share its key, and with it the initial noise and the SDE step.
    repeats = num_sources // self.place.num_local_groups
    group_keys = jnp.repeat(keys.group, repeats, axis=0)
    return random_keys.Keys(group_keys, keys.sample)

  def _reason_table(
    self, drafts: stage_outputs.Drafts, score: types.Score
  ) -> group_table.ReasonTable:
    """Gathers what statistics of the reason stage need."""
    text = drafts.rollout.text
    local = group_table.ReasonTable(
      reward=score.value,
      valid=score.valid,
      parts=score.parts,
      format_reward=drafts.format_reward,
      num_tokens=text.lengths,
      at_limit=text.lengths == text.ids.shape[1],
      is_finite=drafts.rollout.is_finite,
      sde_time=drafts.rollout.trajectory.t,
    )
    return self.place.by_group(local)

  def _edit_table(
    self, edits: stage_outputs.Edits, score: types.Score
  ) -> group_table.EditTable:
    """Gathers what statistics of the reflect and refine stages need."""
    text = edits.text
    local = group_table.EditTable(
      reward=score.value,
      # The return needs the reward of the source image, too.
      valid=score.valid & edits.valid_before,
      parts=score.parts,
      format_reward=edits.format_reward,
      num_tokens=text.lengths,
      at_limit=text.lengths == text.ids.shape[1],
      is_finite=edits.refined.is_finite,
      reward_before=edits.reward_before,
      stop=edits.instruction.stop,
      truncated=edits.truncated,
      prompt_index=edits.prompt_index,
    )
    return self.place.by_group(local)

  def _reason_gradient(
    self,
    state: train_state.TrainState,
    frozen: train_state.Frozen,
    drafts: stage_outputs.Drafts,
    score: types.Score,
  ) -> tuple[update.LossGradient, diagnostics.Metrics]:
    """Returns the gradient of the reason stage, and its metrics."""
    # Statistics are over whole groups, whose samples may be on several replicas.
    table = self._reason_table(drafts, score)
    advantages = returns.reason_advantages(table, self.settings.loss)

    def forward(
      policy: types.Params,
      prompts: experience.Prompts,
      recorded: experience.Recorded,
    ) -> scoring.Outputs:
      actor = self._actor(policy, frozen)
      return scoring.score_reason(actor, prompts, recorded)

    reason = drafts.rollout
    batch = update.Batch(
      shared=drafts.prompts,
      recorded=experience.Recorded(reason.text, reason.trajectory),
      advantages=self.place.local_rows(advantages),
    )
    flow = self.rollout.reason_flow
    gradient, metrics = self._gradient(
      state, frozen, forward, batch, flow, table
    )
    return gradient, diagnostics.reason(table, advantages) | metrics

  def _edit_gradient(
    self,
    state: train_state.TrainState,
    frozen: train_state.Frozen,
    edits: stage_outputs.Edits,
    score: types.Score,
  ) -> tuple[update.LossGradient, diagnostics.Metrics]:
    """Returns the gradient of the reflect and refine stages, and their metrics."""
    table = self._edit_table(edits, score)
    own_sources = self.settings.chain == "full"
    advantages = returns.edit_advantages(table, self.settings.loss, own_sources)

    def forward(
      policy: types.Params,
      shared: tuple[experience.Prompts, experience.Source],
      recorded: experience.RecordedEdit,
    ) -> scoring.Outputs:
      actor = self._actor(policy, frozen)
      prompts, source = shared
      return scoring.score_edit(actor, prompts, source, recorded)

    batch = update.Batch(
      shared=(edits.prompts, edits.source),
      recorded=experience.RecordedEdit(
        edits.text, edits.refined.trajectory, edits.instruction
      ),
      advantages=self.place.local_rows(advantages),
    )
    flow = self.rollout.refine_flow
    gradient, metrics = self._gradient(
      state, frozen, forward, batch, flow, table
    )
    return gradient, diagnostics.edit(table, advantages) | metrics

  def _gradient(
    self,
    state: train_state.TrainState,
    frozen: train_state.Frozen,
    forward: update.Forward,
    batch: update.Batch,
    flow: rollout_settings.FlowSettings,
    table: group_table.GroupTable,
  ) -> tuple[update.LossGradient, diagnostics.Metrics]:
    """Returns the gradient of the objective, which is a sum over all replicas.

    Args:
      state: holds the policy to differentiate by.
      frozen: holds the reference.
      forward: scores the samples.
      batch: the samples of this replica.
      flow: how their images were sampled.
      table: the samples of all replicas.
    """
    loss = self.settings.loss
    # The loss divides by totals over all replicas, so they are needed before the gradient.
    counts = batch.advantages.counts
    num_tokens = objective.text_count(batch.recorded.text, counts)
    num_images = objective.image_count(flow, counts)
    totals = collectives.psum((num_tokens, num_images), placement.AXIS)

    reference = frozen.reference if loss.needs_reference else None
    shared, by_sample = self.place.micro_batches(
      batch.shared,
      (batch.recorded, batch.advantages),
      self.settings.num_micro_batches,
    )
    micro_batches = update.Batch(shared, *by_sample)
    # Every replica differentiates its share of the loss; the shares add up to the loss.
    share = update.gradients(
      state.policy, reference, forward, micro_batches, totals, flow, loss
    )
    result = update.over_replicas(share)
    total_tokens, total_images = totals
    num_terms = total_tokens + total_images
    metrics = {"loss": result.loss} | diagnostics.update(
      result.text, result.image, result.gradients
    )
    num_nonfinite = diagnostics.num_nonfinite(metrics)
    # A sample that is not finite has no score, and the loss may not see it.
    num_nonfinite += jnp.sum(~table.is_finite, dtype=jnp.int32)
    gradient = update.LossGradient(
      result.loss, result.gradients, num_terms, num_nonfinite
    )
    return gradient, metrics | {"skipped": diagnostics.skipped(num_nonfinite)}

  def _step(
    self, state: train_state.TrainState, gradient: update.LossGradient
  ) -> train_state.TrainState:
    """Takes one optimizer step.

    Neither the policy nor the optimizer changes without a sample that counts, nor by a loss, a
    gradient or ratios that are not finite (docs/algorithm.md#update).
    """
    # Every replica takes the same step, with the same gradients.
    updates, opt_state = self.optimizer.update(
      gradient.gradients, state.opt_state, state.policy
    )
    policy = optax.apply_updates(state.policy, updates)
    changed = dataclasses.replace(state, policy=policy, opt_state=opt_state)
    # Otherwise momentum and decay would move the policy, and warm-up would count the update, with
    # nothing learned.
    has_samples = gradient.num_terms > 0
    # One number that is not finite would spread to the whole policy, because the norm that clips
    # the gradient is that of all its parts.
    learns = has_samples & (gradient.num_nonfinite == 0)
    state = jax.tree.map(
      lambda new, old: jnp.where(learns, new, old), changed, state
    )
    # Without the barrier XLA holds about one more copy of the parameters, see docs/tpu.md.
    return jax.lax.optimization_barrier(state)

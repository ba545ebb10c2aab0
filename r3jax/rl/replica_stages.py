"""The stages of an iteration as one replica computes them.

The methods run inside a program that is mapped over the `data` axis, see `mapped.py`: rows of
samples are this replica's, statistics and updates are over all replicas.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from r3jax import types
from r3jax.agent import actors
from r3jax.agent import experience
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
    actor = self._sampling_actor(state, frozen)
    keys = self.place.keys(key, "reason")
    # Every replica gets all prompts and keeps those of its groups.
    local_prompts = self.place.local_prompts(prompts)
    reason = rollout.reason(actor, local_prompts, keys)
    parsed = self.parse(reason.text.ids, reason.text.lengths, "reason")
    format_reward = jnp.asarray(parsed.format)
    return stage_outputs.Drafts(reason, local_prompts, format_reward)

  @jax.named_scope("score")
  def score_drafts(self, drafts: stage_outputs.Drafts) -> types.Score:
    """Scores the drafts."""
    # Targets have a row per group, images one per sample.
    target = self.place.repeat(drafts.prompts.target)
    return self.reward(drafts.rollout.images, target)

  @jax.named_scope("update")
  def learn_to_reason(
    self,
    state: train_state.TrainState,
    frozen: train_state.Frozen,
    drafts: stage_outputs.Drafts,
    score: types.Score,
  ) -> tuple[train_state.TrainState, diagnostics.Metrics]:
    """Updates the policy on the reason stage."""
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
    state, metrics = self._update(state, frozen, forward, batch, flow)
    return state, diagnostics.reason(table, advantages) | metrics

  @jax.named_scope("pool")
  def pool(
    self, drafts: stage_outputs.Drafts, score: types.Score
  ) -> pools.Pool:
    """Gathers the drafts of all replicas with their scores."""
    local = pools.Pool(
      images=drafts.rollout.images,
      reward=score.value,
      valid=score.valid,
      parts=score.parts,
      # The groups of the reason stage are the iteration's prompts, in order.
      prompt_index=self.place.row_ids() // self.settings.group_size,
    )
    return self.place.gather(local)

  # --- Reflect and refine ------------------------------------------------------------------------

  def edit(
    self,
    state: train_state.TrainState,
    frozen: train_state.Frozen,
    prompts: experience.Prompts,
    pool: pools.Pool,
    key: types.Key,
    turn: int,
  ) -> stage_outputs.Edits:
    """Draws a source image for every group, reflects on it and refines it."""
    actor = self._sampling_actor(state, frozen)
    reflect_keys = self.place.keys(key, "reflect", turn)
    refine_keys = self.place.keys(key, "refine", turn)

    # One source image per group, and the prompt that it was made for.
    drawn = self._draw_sources(pool, reflect_keys.group)
    parts_drawn = {name: part[drawn] for name, part in pool.parts.items()}
    prompt_index = pool.prompt_index[drawn]
    group_prompts = jax.tree.map(lambda x: x[prompt_index], prompts)
    source = rollout.look(actor, pool.images[drawn])

    # The samples of a group look at the same image and differ in what they ask for.
    text = rollout.reflect(actor, group_prompts, source, reflect_keys)
    parsed = self.parse(text.ids, text.lengths, "reflect")
    # In a compiled program the parser returns JAX arrays, and these conversions do nothing.
    instruction = experience.Instruction(
      ids=jnp.asarray(parsed.instruction),
      lengths=jnp.asarray(parsed.instruction_length),
      stop=jnp.asarray(parsed.stop),
    )
    refined = rollout.refine(actor, source, instruction, refine_keys)
    return stage_outputs.Edits(
      text=text,
      format_reward=jnp.asarray(parsed.format),
      instruction=instruction,
      truncated=jnp.asarray(parsed.truncated),
      refined=refined,
      prompts=group_prompts,
      source=source,
      reward_before=self.place.repeat(pool.reward[drawn]),
      valid_before=self.place.repeat(pool.valid[drawn]),
      parts_before=self.place.repeat(parts_drawn),
      prompt_index=self.place.repeat(prompt_index),
    )

  @jax.named_scope("score")
  def score_edits(self, edits: stage_outputs.Edits) -> types.Score:
    """Scores the edits; an image that was not edited keeps its score."""
    target = self.place.repeat(edits.prompts.target)
    stop = edits.instruction.stop
    score = self.reward(edits.refined.images, target, ~stop)
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
    table = self._edit_table(edits, score)
    advantages = returns.edit_advantages(table, self.settings.loss)

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
    state, metrics = self._update(state, frozen, forward, batch, flow)
    return state, diagnostics.edit(table, advantages) | metrics

  @jax.named_scope("pool")
  def pool_again(
    self, edits: stage_outputs.Edits, score: types.Score
  ) -> pools.Pool:
    """Gathers the edits of all replicas with their scores, for a further round."""
    local = pools.Pool(
      images=edits.refined.images,
      reward=score.value,
      valid=score.valid & edits.valid_before,
      parts=score.parts,
      prompt_index=edits.prompt_index,
    )
    return self.place.gather(local)

  # --- Parts of the stages -----------------------------------------------------------------------

  def _actor(
    self, policy: types.Params, frozen: train_state.Frozen
  ) -> actors.Actor:
    """Returns the actor that scores recorded samples and is differentiated."""
    return actors.Actor(
      self.modules, frozen.whole(policy), frozen.towers, self.rollout
    )

  def _sampling_actor(
    self, state: train_state.TrainState, frozen: train_state.Frozen
  ) -> actors.Actor:
    """Returns the actor of rollouts."""
    policy = frozen.whole(state.policy)
    return actors.sampler(self.modules, policy, frozen.towers, self.rollout)

  def _draw_sources(self, pool: pools.Pool, group_keys: types.Key) -> jax.Array:
    """Returns the index of an image of the pool for every group, [num_local_groups]."""

    def draw(group_key: types.Key) -> jax.Array:
      # The group's key itself belongs to its flow noise.
      key = jax.random.fold_in(group_key, 0)
      return pools.draw(
        key, pool.reward, pool.valid, self.settings.pool_perfect
      )

    return jax.vmap(draw)(group_keys)

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
      reward_before=edits.reward_before,
      stop=edits.instruction.stop,
      truncated=edits.truncated,
      prompt_index=edits.prompt_index,
    )
    return self.place.by_group(local)

  def _update(
    self,
    state: train_state.TrainState,
    frozen: train_state.Frozen,
    forward: update.Forward,
    batch: update.Batch,
    flow: rollout_settings.FlowSettings,
  ) -> tuple[train_state.TrainState, diagnostics.Metrics]:
    """Takes one optimizer step on the objective, which is a sum over all replicas.

    Without a sample that counts, neither the policy nor the optimizer changes.

    Args:
      state: before the step.
      frozen: holds the reference.
      forward: scores the samples.
      batch: the samples of this replica.
      flow: how their images were sampled.
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

    # Every replica takes the same step, with the same gradients.
    updates, opt_state = self.optimizer.update(
      result.gradients, state.opt_state, state.policy
    )
    policy = optax.apply_updates(state.policy, updates)
    changed = dataclasses.replace(state, policy=policy, opt_state=opt_state)
    # Otherwise momentum and decay would move the policy, and warm-up would count the update, with
    # nothing learned.
    has_samples = sum(totals) > 0
    state = jax.tree.map(
      lambda new, old: jnp.where(has_samples, new, old), changed, state
    )
    metrics = diagnostics.update(result.text, result.image, result.gradients)
    # Without the barrier XLA holds about one more copy of the parameters, see docs/tpu.md.
    return jax.lax.optimization_barrier(state), {"loss": result.loss} | metrics

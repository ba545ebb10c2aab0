"""The R3 iteration: reason -> update -> pool -> reflect and refine -> update (R3.md 4 to 8).

`Iteration` holds the stages as pure functions of one replica, mapped over the `data` axis.
`fused` makes one program of them, `split` separate ones.
"""

from collections.abc import Callable
import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import optax

from r3jax import types
from r3jax.agent import actors
from r3jax.agent import experience
from r3jax.agent import rollout as rollout_lib
from r3jax.agent import rollout_settings
from r3jax.agent import scoring
from r3jax.model import low_rank
from r3jax.parallel import collectives
from r3jax.rl import diagnostics
from r3jax.rl import iteration_settings
from r3jax.rl import objective
from r3jax.rl import placement
from r3jax.rl import pool as pool_lib
from r3jax.rl import returns
from r3jax.rl import train_state
from r3jax.rl import update
from r3jax.sequence import thoughts

AXIS = placement.AXIS
Metrics = dict[str, jax.Array]
Reward = types.Scoring
# ids [B, T], lengths [B], stage
Parse = Callable[[jax.Array, jax.Array, str], thoughts.Parsed]


@flax.struct.dataclass
class Drafts:
  """The reason stage of one replica."""

  rollout: experience.Reason
  prompts: experience.Prompts  # rows of groups
  format: jax.Array  # [B]


@flax.struct.dataclass
class Pool:
  """Every image of a stage, over all groups and replicas (R3.md section 7)."""

  images: types.Images  # [P, H, W, 3]
  score: jax.Array  # [P]
  valid: jax.Array  # [P]
  row: jax.Array  # [P] which of the iteration's prompts it was made for


@flax.struct.dataclass
class Edits:
  """The reflect and refine stages of one replica."""

  text: experience.Text
  parsed: thoughts.Parsed
  refined: experience.Refine
  prompts: experience.Prompts  # rows of groups
  source: experience.Source  # rows of groups
  before: jax.Array  # [B] score of the source
  before_valid: jax.Array  # [B]
  row: jax.Array  # [B] which of the iteration's prompts

  @property
  def instruction(self) -> experience.Instruction:
    """What the refine stage was told."""
    return experience.Instruction(
      self.parsed.instruction, self.parsed.instruction_length, self.parsed.stop
    )


@flax.struct.dataclass
class Frozen:
  """Parameters that an iteration reads and never changes."""

  towers: types.Params  # {"vision", "autoencoder"}
  # that the KL is taken to: None where no KL is, {} where it is the base
  reference: types.Params | None
  # what the trained adapters belong to; None where all is trained
  base: types.Params | None = None

  def whole(self, trained: types.Params) -> types.Params:
    """Returns the policy that the modules run, from what is trained of it."""
    return low_rank.join(self.base, trained)


@dataclasses.dataclass(frozen=True)
class Iteration:
  """The stages of one R3 iteration on one replica.

  Attributes:
    modules: the model.
    rollout: how it samples.
    settings: what it learns from, and how.
    reward: scores images.
    parse: reads tags and instructions out of sampled text.
    optimizer: changes the policy.
    replicas: size of the `data` axis.
  """

  modules: actors.Modules
  rollout: rollout_settings.RolloutSettings
  settings: iteration_settings.IterationSettings
  reward: Reward
  parse: Parse
  optimizer: optax.GradientTransformation
  replicas: int

  @property
  def place(self) -> placement.Placement:
    """This replica's share."""
    return placement.Placement(
      self.settings.num_groups, self.settings.group_size, self.replicas
    )

  def _actor(self, policy: types.Params, frozen: Frozen) -> actors.Actor:
    return actors.Actor(
      self.modules, frozen.whole(policy), frozen.towers, self.rollout
    )

  def _sampler(
    self, state: train_state.TrainState, frozen: Frozen
  ) -> actors.Actor:
    return actors.sampler(
      self.modules, frozen.whole(state.policy), frozen.towers, self.rollout
    )

  @jax.named_scope("reason")
  def draft(
    self,
    state: train_state.TrainState,
    frozen: Frozen,
    prompts: experience.Prompts,
    key,
  ) -> Drafts:
    """Rolls the reason stage out."""
    actor, keys = self._sampler(state, frozen), self.place.keys(key, "reason")
    local = self.place.local_prompts(prompts)
    rollout = rollout_lib.reason(actor, local, keys)
    parsed = self.parse(rollout.text.ids, rollout.text.lengths, "reason")
    return Drafts(rollout, local, parsed.format)

  @jax.named_scope("score")
  def score_drafts(self, drafts: Drafts) -> types.Score:
    """Scores drafts."""
    return self.reward(
      drafts.rollout.images, self.place.repeat(drafts.prompts.target)
    )

  @jax.named_scope("score")
  def score_edits(self, edits: Edits) -> types.Score:
    """Scores refined images; an image that was kept keeps its score."""
    score = self.reward(
      edits.refined.images, self.place.repeat(edits.prompts.target)
    )
    kept = edits.parsed.stop
    value = jnp.where(kept, edits.before, score.value)
    return score.replace(
      value=value, valid=jnp.where(kept, edits.before_valid, score.valid)
    )

  @jax.named_scope("update")
  def learn_to_reason(
    self,
    state: train_state.TrainState,
    frozen: Frozen,
    drafts: Drafts,
    score: types.Score,
  ) -> tuple[train_state.TrainState, Metrics]:
    """Updates the policy on the reason stage."""
    loss, rollout, valid = (
      self.settings.loss,
      drafts.rollout,
      self._comparable(score.valid),
    )
    text_return = returns.reason_return(
      score.value, drafts.format, loss.format_weight
    )
    text_advantage, image_advantage = (
      self._advantage(x, valid) for x in (text_return, score.value)
    )

    def forward(policy, prompts, recorded: update.Recorded):
      drafted = experience.Reason(recorded.text, recorded.flow, None)
      return scoring.score_reason(self._actor(policy, frozen), prompts, drafted)

    recorded = update.Recorded(
      rollout.text, rollout.flow, None, text_advantage, image_advantage, valid
    )
    state, metrics = self._update(
      state,
      frozen,
      forward,
      drafts.prompts,
      recorded,
      self.rollout.reason_flow,
    )
    return state, diagnostics.reason(
      self.place, drafts, score, text_advantage, image_advantage
    ) | metrics

  @jax.named_scope("pool")
  def pool(self, drafts: Drafts, score: types.Score) -> Pool:
    """Gathers every draft with its score."""
    place = self.place
    row = (place.first_row() + jnp.arange(place.rows)) // place.group_size
    return place.gather(
      Pool(drafts.rollout.images, score.value, score.valid, row)
    )

  @jax.named_scope("pool")
  def pool_again(self, edits: Edits, score: types.Score) -> Pool:
    """Gathers every edit with its score, for a further round."""
    valid = score.valid & edits.before_valid
    return self.place.gather(
      Pool(edits.refined.images, score.value, valid, edits.row)
    )

  def edit(
    self,
    state: train_state.TrainState,
    frozen: Frozen,
    prompts: experience.Prompts,
    pool: Pool,
    key,
    turn: int,
  ) -> Edits:
    """Draws a source image for every group, reflects on it and refines it."""
    place, actor = self.place, self._sampler(state, frozen)
    reflect_keys, refine_keys = (
      place.keys(key, "reflect", turn),
      place.keys(key, "refine", turn),
    )
    draw = lambda key: pool_lib.draw(
      key, pool.score, pool.valid, self.settings.pool_perfect
    )
    chosen = jax.vmap(lambda key: draw(jax.random.fold_in(key, 0)))(
      reflect_keys.group
    )
    row = pool.row[chosen]
    local = jax.tree.map(lambda x: x[row], prompts)
    source = rollout_lib.look(actor, pool.images[chosen])
    text = rollout_lib.reflect(actor, local, source, reflect_keys)
    parsed = self.parse(text.ids, text.lengths, "reflect")
    before, before_valid, row = place.repeat(
      (pool.score[chosen], pool.valid[chosen], row)
    )
    told = experience.Instruction(
      parsed.instruction, parsed.instruction_length, parsed.stop
    )
    refined = rollout_lib.refine(actor, source, told, refine_keys)
    return Edits(
      text, parsed, refined, local, source, before, before_valid, row
    )

  @jax.named_scope("update")
  def learn_to_edit(
    self,
    state: train_state.TrainState,
    frozen: Frozen,
    edits: Edits,
    score: types.Score,
  ) -> tuple[train_state.TrainState, Metrics]:
    """Updates the policy on the reflect and refine stages."""
    loss, parsed = self.settings.loss, edits.parsed
    valid = self._comparable(score.valid & edits.before_valid)
    text_return = returns.reflect_return(
      score.value, edits.before, parsed.stop, parsed.format, loss.format_weight
    )
    text_advantage, image_advantage = (
      self._advantage(x, valid) for x in (text_return, score.value)
    )
    image_advantage = jnp.where(parsed.stop, 0.0, image_advantage)

    def forward(policy, groups, recorded: update.Recorded):
      (prompts, source), actor = groups, self._actor(policy, frozen)
      logprob = scoring.score_reflect(actor, prompts, source, recorded.text)
      refined = experience.Refine(recorded.flow, None)
      return logprob, scoring.score_refine(
        actor, source, recorded.told, refined
      )

    groups = (edits.prompts, edits.source)
    recorded = update.Recorded(
      edits.text,
      edits.refined.flow,
      edits.instruction,
      text_advantage,
      image_advantage,
      valid,
    )
    state, metrics = self._update(
      state, frozen, forward, groups, recorded, self.rollout.refine_flow
    )
    return state, diagnostics.edit(
      self.place, edits, score, text_advantage, image_advantage
    ) | metrics

  def _comparable(self, valid: jax.Array) -> jax.Array:
    """Returns this replica's valid samples without those that are the only one of their group."""
    by_group = self.place.by_group(valid)
    return self.place.local_rows(
      by_group & (by_group.sum(axis=1, keepdims=True) >= 2)
    )

  def _advantage(self, value: jax.Array, valid: jax.Array) -> jax.Array:
    """Returns this replica's advantages; the statistics are over whole groups."""
    by_group = self.place.by_group
    found = returns.group_advantage(
      by_group(value), by_group(valid), self.settings.loss.divide_by_std
    )
    return self.place.local_rows(found)

  def _update(
    self,
    state: train_state.TrainState,
    frozen: Frozen,
    forward: update.Forward,
    groups,
    recorded: update.Recorded,
    flow: rollout_settings.FlowSettings,
  ) -> tuple[train_state.TrainState, Metrics]:
    """Takes one optimizer step on the objective summed over all replicas; none where nothing counts.

    Args:
      state: before.
      frozen: holds the reference.
      forward: scores the samples.
      groups: rows of groups that it needs.
      recorded: the samples.
      flow: of their images.
    """
    tokens, images = (
      objective.text_count(recorded.text, recorded.valid),
      objective.image_count(flow, recorded.valid),
    )
    totals = collectives.total((tokens, images), AXIS)
    reference = frozen.reference if self.settings.loss.needs_reference else None
    batch = self.place.micro_batches(
      groups, recorded, self.settings.num_micro_batches
    )
    found = update.gradients(
      state.policy, reference, forward, batch, totals, flow, self.settings.loss
    )
    value, gradients = collectives.total((found.value, found.gradients), AXIS)
    updates, opt_state = self.optimizer.update(
      gradients, state.opt_state, state.policy
    )
    changed = state.replace(
      policy=optax.apply_updates(state.policy, updates), opt_state=opt_state
    )
    # Momentum alone would move the policy on, and a decay or a warm-up count, with nothing learned.
    counts = sum(totals) > 0
    state = jax.tree.map(
      lambda new, old: jnp.where(counts, new, old), changed, state
    )
    # Without the barrier XLA holds about one more copy of the parameters, see docs/tpu.md.
    return jax.lax.optimization_barrier(state), {
      "loss": value
    } | diagnostics.update(found.text, found.images, gradients)


@flax.struct.dataclass
class Samples:
  """What an iteration made, per sample, for reports; the edit half is None when there was none."""

  drafts: Drafts
  draft_score: types.Score
  edits: Edits | None
  edit_score: types.Score | None


def _prefixed(prefix: str, metrics: Metrics) -> Metrics:
  """Names metrics by stage; the mismatches go under their own heading."""

  def rename(name: str) -> str:
    kind = name.removeprefix("mismatch_")
    return f"{prefix}/{name}" if kind == name else f"mismatch/{prefix}_{kind}"

  return {rename(name): value for name, value in metrics.items()}


def numbered(name: str, turn: int) -> str:
  """Returns the name of a round's metrics: edit, edit2, edit3, ..."""
  return name if turn == 0 else f"{name}{turn + 1}"


def run(iteration, state, frozen: Frozen, prompts: experience.Prompts, seed):
  """Runs one iteration; `iteration` has the methods of `Iteration`, mapped or not.

  Returns:
    The new state, metrics and `Samples` (of the last edit round).
  """
  key = jax.random.fold_in(jax.random.key(seed), state.step)
  drafts = iteration.draft(state, frozen, prompts, key)
  draft_score = iteration.score_drafts(drafts)
  state, metrics = iteration.learn_to_reason(state, frozen, drafts, draft_score)
  metrics = _prefixed("reason", metrics)
  edits = edit_score = None
  pool = iteration.pool(drafts, draft_score)
  for turn in range(iteration.settings.num_reflect_rounds):
    metrics |= _prefixed(
      numbered("pool", turn), diagnostics.pool(pool.score, pool.valid)
    )
    edits = iteration.edit(state, frozen, prompts, pool, key, turn)
    edit_score = iteration.score_edits(edits)
    state, found = iteration.learn_to_edit(state, frozen, edits, edit_score)
    metrics |= _prefixed(numbered("edit", turn), found)
    pool = iteration.pool_again(edits, edit_score)
  return (
    state.replace(step=state.step + 1),
    metrics,
    Samples(drafts, draft_score, edits, edit_score),
  )

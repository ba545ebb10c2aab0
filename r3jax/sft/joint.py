"""The losses of the policy: cross-entropy on texts, and flow matching on images.

Next-token cross-entropy on thoughts, reflections and answers, and the MSE of the velocity on drafts
and edits, with and without the guidance branches, all on the layouts that R3 samples with.
"""

from collections.abc import Mapping
import dataclasses

import jax
import jax.numpy as jnp

from r3jax import types
from r3jax.agent import actors
from r3jax.agent import contexts
from r3jax.agent import experience
from r3jax.agent import rollout
from r3jax.agent import rollout_settings
from r3jax.model import network
from r3jax.rl import losses
from r3jax.sequence import layouts
from r3jax.sequence import segments
from r3jax.sft import fitting
from r3jax.worlds.shapes import batches
from r3jax.worlds.shapes import scenes

# Weight of the guidance branches beside that of the full context.
_BRANCH_WEIGHT = 0.2


@dataclasses.dataclass(frozen=True)
class _Before:
  """What an image is drawn after.

  Attributes:
    layout: of the stage.
    lengths: of its text segments, [B] each.
    caches: of the segments before the image.
  """

  layout: segments.Layout
  lengths: Mapping[str, types.Lengths]
  caches: tuple[network.Cache, ...]


@dataclasses.dataclass(frozen=True)
class JointTraining:
  """The loss of one step over examples of all kinds.

  Attributes:
    modules: the model.
    settings: layouts and system prompts.
    frozen: {"vision", "autoencoder"} parameters.
    copies: noisy copies of every image.
    flow_weight: weight of the flow MSE beside the cross-entropies.
    shift: shift of the times' logit-normal distribution, as in the sampling schedule.
  """

  modules: actors.Modules
  settings: rollout_settings.RolloutSettings
  frozen: types.Params
  copies: int
  flow_weight: float
  shift: float

  def loss(
    self, policy: types.Params, batch: batches.Batch, key: jax.Array
  ) -> tuple[jax.Array, fitting.Metrics]:
    """Returns thought + answer + flow_weight (draft + edit), and these parts."""
    actor = self._actor(policy)
    reason_key, refine_key = jax.random.split(key)
    thought, before = self._think(actor, batch.reason)
    draft = self._draft(actor, batch.reason, before, reason_key)
    answer = self._reflect(actor, batch.reflect)
    edit = self._refine(actor, batch.refine, refine_key)
    value = thought + answer + self.flow_weight * (draft + edit)
    parts = {"thought": thought, "answer": answer, "draft": draft, "edit": edit}
    return value, {"loss": value} | parts

  def text_loss(
    self, policy: types.Params, batch: batches.Batch, key: jax.Array
  ) -> tuple[jax.Array, fitting.Metrics]:
    """Returns the part of the loss about texts; most of the cost is in the other part."""
    del key  # nothing is drawn
    actor = self._actor(policy)
    thought, _ = self._think(actor, batch.reason)
    answer = self._reflect(actor, batch.reflect)
    value = thought + answer
    return value, {"loss": value, "thought": thought, "answer": answer}

  def _actor(self, policy: types.Params) -> actors.Actor:
    return actors.Actor(self.modules, policy, self.frozen, self.settings)

  # --- Texts -----------------------------------------------------------------------------------

  def _think(
    self, actor: actors.Actor, rows: batches.ReasonRows
  ) -> tuple[jax.Array, _Before]:
    """Returns the cross-entropy of the thoughts, and what their images are drawn after."""
    prompts = _prompts(rows.prompt)
    context = contexts.reason_context(actor, prompts, 1)
    lengths = {**context.lengths, "thought": rows.thought.lengths}
    inputs = {"thought": rows.thought.ids}
    output = actor.run(context.layout, inputs, lengths, (context.cache,))
    loss = _cross_entropy(actor, output.text("thought"), rows.thought)
    caches = (context.cache, output.cache)
    return loss, _Before(context.layout, lengths, caches)

  def _reflect(
    self, actor: actors.Actor, rows: batches.ReflectRows
  ) -> jax.Array:
    """Returns the cross-entropy of the answers to questions about images."""
    images = scenes.render(rows.scene)
    features = actor.modules.towers.features(actor.frozen, images)
    prompts = _prompts(rows.question)
    context = contexts.reflect_context(actor, prompts, features, 1)
    lengths = {**context.lengths, "answer": rows.answer.lengths}
    inputs = {"answer": rows.answer.ids}
    output = actor.run(context.layout, inputs, lengths, (context.cache,))
    return _cross_entropy(actor, output.text("answer"), rows.answer)

  # --- Images ----------------------------------------------------------------------------------

  def _draft(
    self,
    actor: actors.Actor,
    rows: batches.ReasonRows,
    before: _Before,
    key: jax.Array,
  ) -> jax.Array:
    """Returns the flow error of images of thoughts."""
    clean = self._latent(actor, rows.scene)
    return self._flow(actor, before, clean, layouts.DRAFT, key)

  def _refine(
    self, actor: actors.Actor, rows: batches.RefineRows, key: jax.Array
  ) -> jax.Array:
    """Returns the flow error of edited images."""
    source = rollout.look(actor, scenes.render(rows.scene))
    context = contexts.refine_context(actor, source.latent, source.features, 1)
    # The instruction stands twice: after the image, and alone for guidance.
    names = ("instruction", "instruction_alone")
    lengths = dict.fromkeys(names, rows.instruction.lengths)
    inputs = dict.fromkeys(names, rows.instruction.ids)
    output = actor.run(context.layout, inputs, lengths, (context.cache,))
    caches = (context.cache, output.cache)
    before = _Before(context.layout, lengths, caches)
    clean = self._latent(actor, rows.target)
    return self._flow(actor, before, clean, layouts.EDIT, key)

  def _latent(self, actor: actors.Actor, scene: scenes.Scene) -> types.Latent:
    return actor.modules.towers.encode(actor.frozen, scenes.render(scene))

  def _flow(
    self,
    actor: actors.Actor,
    before: _Before,
    clean: types.Latent,
    branches: tuple[str, ...],
    key: jax.Array,
  ) -> jax.Array:
    """Returns the error of the full context, plus that of the guidance branches.

    The full context sees `copies` noisy copies of every image, the branches one.
    """
    full, *others = branches
    full_key, others_key = jax.random.split(key)
    full_error = self._flow_error(
      actor, before, clean, (full,), self.copies, full_key
    )
    others_error = self._flow_error(
      actor, before, clean, tuple(others), 1, others_key
    )
    return full_error + _BRANCH_WEIGHT * others_error

  def _flow_error(
    self,
    actor: actors.Actor,
    before: _Before,
    clean: types.Latent,
    branches: tuple[str, ...],
    copies: int,
    key: jax.Array,
  ) -> jax.Array:
    """Returns the mean of |v - (noise - data)|² over noisy copies of images and named branches."""
    noise_key, time_key = jax.random.split(key)
    clean = jnp.repeat(clean, copies, axis=0)
    lengths = {
      name: jnp.repeat(length, copies)
      for name, length in before.lengths.items()
    }
    noise = jax.random.normal(noise_key, clean.shape)
    u = jax.nn.sigmoid(jax.random.normal(time_key, clean.shape[:1]))
    t = self.shift * u / (1 + (self.shift - 1) * u)
    noised = network.Noised(clean + t[:, None, None] * (noise - clean), t)
    inputs = dict.fromkeys(branches, noised)
    output = actor.run(before.layout, inputs, lengths, before.caches)
    errors = [
      jnp.mean((velocity - (noise - clean)) ** 2)
      for velocity in actor.velocities(output, branches)
    ]
    return sum(errors) / len(branches)


def _prompts(text: batches.TextRows) -> experience.Prompts:
  """Returns prompts of one text each, which stands for the prompt and for the question about it."""
  return experience.Prompts(
    ids=text.ids,
    length=text.lengths,
    question=text.ids,
    question_length=text.lengths,
    target=None,
    index=jnp.arange(text.lengths.shape[0]),
  )


def _cross_entropy(
  actor: actors.Actor, hidden: types.Hidden, rows: batches.TextRows
) -> jax.Array:
  """Returns the mean next-token cross-entropy, the end token included."""
  mask = losses.token_mask(rows.lengths + 1, rows.ids.shape[1])
  logprob = actor.logprob(hidden, rows.ids)
  return -jnp.sum(jnp.where(mask, logprob, 0.0)) / jnp.sum(mask)

"""Supervised training of a small BAGEL: autoencoder and ViT first, then text and flow together.

The ViT learns to tell what stands in every cell, as SigLIP comes pretrained to BAGEL. Then
next-token cross-entropy on thoughts, reflections and answers, and flow-matching MSE on drafts and
edits, with and without the guidance branches, on the layouts that R3 samples with.
"""

from collections.abc import Callable, Iterator
import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import optax

from r3jax import types
from r3jax.agent import actors
from r3jax.agent import contexts
from r3jax.agent import experience
from r3jax.agent import rollout
from r3jax.agent import rollout_settings
from r3jax.model import autoencoder
from r3jax.model import layers
from r3jax.model import network
from r3jax.model import preprocess
from r3jax.model import siglip
from r3jax.parallel import meshes
from r3jax.parallel import sharding
from r3jax.rl import losses
from r3jax.sequence import layouts
from r3jax.worlds.shapes import batches as batches_lib
from r3jax.worlds.shapes import scenes


def autoencoder_loss(
  model: autoencoder.Autoencoder,
  params: types.Params,
  images: types.Images,
  kl_weight: float,
  key,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns pixel MSE + kl_weight * KL(posterior | standard normal), and its parts.

  Args:
    model: the autoencoder.
    params: its parameters.
    images: [B, H, W, 3] uint8.
    kl_weight: of the mean KL per latent number.
    key: latents are drawn from the posterior.
  """
  pixels = preprocess.to_pixels(images)
  moments = model.apply({"params": params}, pixels, method="moments")
  mean, logvar = jnp.split(moments, 2, axis=-1)
  logvar = jnp.clip(logvar, -20.0, 10.0)
  z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
  restored = model.apply(
    {"params": params}, z, method=lambda module, z: module.decoder(z)
  )
  mse = jnp.mean((restored - pixels) ** 2)
  kl = 0.5 * jnp.mean(mean**2 + jnp.exp(logvar) - 1 - logvar)
  return mse + kl_weight * kl, {"mse": mse, "kl": kl}


def vision_loss(
  tower: siglip.VisionTransformer, params: types.Params, scene: scenes.Scene
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns the cross-entropy of a linear reading of every cell's ViT feature, and its parts.

  Args:
    tower: a ViT whose patches are the cells.
    params: {"tower", "head"}, the head [hidden, 3 + shapes + colours]: empty, object or smudge;
      the object's shape; its colour.
    scene: [B, 9].
  """
  pixels = preprocess.to_pixels(scenes.render(scene))
  positions = layers.grid_positions(scenes.GRID, scenes.GRID, scenes.GRID)
  features = tower.apply(
    {"params": params["tower"]}, layers.patchify(pixels, scenes.CELL), positions
  )
  state, shape, color = jnp.split(
    features @ params["head"], (3, 3 + len(scenes.SHAPES)), axis=-1
  )
  filled = scene.shape >= 0
  clear = filled & (scene.ghost_shape < 0)
  cross_entropy = optax.softmax_cross_entropy_with_integer_labels
  mean = lambda x: (
    jnp.sum(jnp.where(clear, x, 0.0)) / jnp.maximum(jnp.sum(clear), 1)
  )
  of_state = jnp.mean(
    cross_entropy(state, jnp.where(filled, jnp.where(clear, 1, 2), 0))
  )
  of_shape = mean(cross_entropy(shape, jnp.maximum(scene.shape, 0)))
  value = of_state + of_shape + mean(cross_entropy(color, scene.color))
  return value, {
    "vision": value,
    "shapes right": mean(jnp.argmax(shape, -1) == scene.shape),
  }


def adamw(
  learning_rate: float, num_steps: int, warmup: int
) -> optax.GradientTransformation:
  """Returns AdamW (0.9, 0.95) with clipping at norm 1, linear warm-up and cosine decay."""
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, learning_rate, warmup, num_steps, learning_rate * 0.01
  )
  return optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(schedule, 0.9, 0.95, weight_decay=0.0),
  )


@flax.struct.dataclass
class SFTState:
  """Parameters in training and their optimizer."""

  params: types.Params
  opt_state: optax.OptState
  step: jax.Array


def fit(
  loss: Callable,
  params: types.Params,
  optimizer: optax.GradientTransformation,
  batches: Iterator,
  seed: int,
  watch: Callable[[int, types.Params, dict], None],
) -> types.Params:
  """Minimises a loss over batches, which are split over all devices.

  Args:
    loss: (params, batch, key) -> (value, metrics).
    params: to start from.
    optimizer: see `adamw`.
    batches: pytrees of arrays.
    seed: of the keys.
    watch: called after every step with its number (from 1), the parameters and the metrics.

  Returns:
    The parameters after the last batch.
  """

  @jax.jit
  def step(state: SFTState, batch):
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    (_, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(
      state.params, batch, key
    )
    updates, opt_state = optimizer.update(
      gradients, state.opt_state, state.params
    )
    return SFTState(
      optax.apply_updates(state.params, updates), opt_state, state.step + 1
    ), metrics

  mesh = meshes.make_mesh(data=-1, fsdp=1, tensor=1)
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  params = jax.device_put(params, sharding.replicated(mesh))
  state = SFTState(params, optimizer.init(params), jnp.int32(0))
  for number, batch in enumerate(batches, 1):
    state, metrics = step(state, jax.device_put(batch, rows))
    watch(number, state.params, metrics)
  return state.params


@dataclasses.dataclass(frozen=True)
class JointTraining:
  """The loss of one SFT step over all kinds of examples.

  Attributes:
    modules: the model.
    settings: layouts and system prompts.
    frozen: {"vision", "autoencoder"} parameters.
    copies: noisy copies of every image per example.
    flow_weight: weight of the flow MSE against the cross-entropies.
    shift: of the times' logit-normal distribution, as in the sampling schedule.
  """

  modules: actors.Modules
  settings: rollout_settings.RolloutSettings
  frozen: types.Params
  copies: int
  flow_weight: float
  shift: float

  def loss(
    self, policy: types.Params, batch: batches_lib.Batch, key
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the loss and its parts."""
    actor = actors.Actor(self.modules, policy, self.frozen, self.settings)
    reason_key, refine_key = jax.random.split(key)
    thought, draft = self._reason(actor, batch.reason, reason_key)
    answer = self._reflect(actor, batch.reflect)
    edit = self._refine(actor, batch.refine, refine_key)
    value = thought + answer + self.flow_weight * (draft + edit)
    return value, {
      "loss": value,
      "thought": thought,
      "answer": answer,
      "draft": draft,
      "edit": edit,
    }

  def text_loss(
    self, policy: types.Params, batch: batches_lib.Batch, key
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the part of the loss that is about texts, and its parts; images cost most of the other."""
    del key  # nothing is drawn
    actor = actors.Actor(self.modules, policy, self.frozen, self.settings)
    thought, *_ = self._think(actor, batch.reason)
    answer = self._reflect(actor, batch.reflect)
    return thought + answer, {
      "loss": thought + answer,
      "thought": thought,
      "answer": answer,
    }

  def _think(self, actor: actors.Actor, rows: batches_lib.ReasonRows):
    """Returns the thoughts' cross-entropy, and layout, lengths and caches for their images."""
    context = contexts.reason_context(
      actor, _prompts(rows.prompt, rows.prompt), 1
    )
    lengths = {**context.lengths, "thought": rows.thought.lengths}
    output = actor.run(
      context.layout, {"thought": rows.thought.ids}, lengths, (context.cache,)
    )
    thought = _cross_entropy(actor, output.text("thought"), rows.thought)
    return thought, context.layout, lengths, (context.cache, output.cache)

  def _reason(self, actor: actors.Actor, rows: batches_lib.ReasonRows, key):
    thought, layout, lengths, past = self._think(actor, rows)
    return thought, self._flow(
      actor,
      layout,
      self._latent(actor, rows.scene),
      lengths,
      past,
      layouts.DRAFT,
      key,
    )

  def _reflect(
    self, actor: actors.Actor, rows: batches_lib.ReflectRows
  ) -> jax.Array:
    features = actor.modules.towers.features(
      actor.frozen, scenes.render(rows.scene)
    )
    context = contexts.reflect_context(
      actor, _prompts(rows.question, rows.question), features, 1
    )
    lengths = {**context.lengths, "answer": rows.answer.lengths}
    output = actor.run(
      context.layout, {"answer": rows.answer.ids}, lengths, (context.cache,)
    )
    return _cross_entropy(actor, output.text("answer"), rows.answer)

  def _refine(
    self, actor: actors.Actor, rows: batches_lib.RefineRows, key
  ) -> jax.Array:
    source = rollout.look(actor, scenes.render(rows.scene))
    context = contexts.refine_context(actor, source.latent, source.features, 1)
    lengths = dict.fromkeys(
      ("instruction", "instruction_alone"), rows.instruction.lengths
    )
    inputs = dict.fromkeys(lengths, rows.instruction.ids)
    own = actor.run(context.layout, inputs, lengths, (context.cache,)).cache
    clean = self._latent(actor, rows.target)
    return self._flow(
      actor,
      context.layout,
      clean,
      lengths,
      (context.cache, own),
      layouts.EDIT,
      key,
    )

  def _latent(self, actor: actors.Actor, scene: scenes.Scene) -> types.Latent:
    return actor.modules.towers.encode(actor.frozen, scenes.render(scene))

  def _flow(self, actor, layout, clean, lengths, past, names, key) -> jax.Array:
    """Returns the MSE of the full branch on `copies` noisy copies and of the others on one."""
    full, *others = names
    first, second = jax.random.split(key)
    value = self._flow_error(
      actor, layout, clean, lengths, past, (full,), self.copies, first
    )
    rest = self._flow_error(
      actor, layout, clean, lengths, past, tuple(others), 1, second
    )
    return value + 0.2 * rest

  def _flow_error(
    self, actor, layout, clean, lengths, past, names, copies: int, key
  ) -> jax.Array:
    """Returns the mean of |v - (noise - data)|^2 over `copies` noisy copies and the named branches."""
    noise_key, time_key = jax.random.split(key)
    clean = jnp.repeat(clean, copies, axis=0)
    lengths = {
      name: jnp.repeat(length, copies) for name, length in lengths.items()
    }
    noise = jax.random.normal(noise_key, clean.shape)
    u = jax.nn.sigmoid(jax.random.normal(time_key, clean.shape[:1]))
    t = self.shift * u / (1 + (self.shift - 1) * u)
    noised = network.Noised(clean + t[:, None, None] * (noise - clean), t)
    output = actor.run(layout, dict.fromkeys(names, noised), lengths, past)
    return sum(
      jnp.mean((v - (noise - clean)) ** 2)
      for v in actor.velocities(output, names)
    ) / len(names)


def _prompts(
  prompt: batches_lib.TextRows, question: batches_lib.TextRows
) -> experience.Prompts:
  rows = jnp.arange(prompt.lengths.shape[0])
  return experience.Prompts(
    prompt.ids, prompt.lengths, question.ids, question.lengths, None, rows
  )


def _cross_entropy(
  actor: actors.Actor, hidden: types.Hidden, rows: batches_lib.TextRows
) -> jax.Array:
  """Returns the mean next-token cross-entropy, the end token included."""
  mask = losses.token_mask(rows.lengths + 1, rows.ids.shape[1])
  return -jnp.sum(
    jnp.where(mask, actor.logprob(hidden, rows.ids), 0.0)
  ) / jnp.sum(mask)

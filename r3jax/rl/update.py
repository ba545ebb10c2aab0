"""The gradient of one update, over micro-batches and replicas (docs/algorithm.md#update)."""

from collections.abc import Callable
import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from r3jax import types
from r3jax.agent import experience
from r3jax.agent import rollout_settings
from r3jax.agent import scoring
from r3jax.parallel import collectives
from r3jax.rl import iteration_settings
from r3jax.rl import objective
from r3jax.rl import placement
from r3jax.rl import returns

# (policy, `Batch.shared`, `Batch.recorded`) -> what the policy gives the recorded samples
Forward = Callable[[types.Params, Any, Any], scoring.Outputs]


@flax.struct.dataclass
class Batch:
  """Samples of one stage as an update reads them.

  With a leading axis of micro-batches it is a sequence of batches.

  Attributes:
    shared: what scoring needs once per group, a pytree of rows of groups.
    recorded: what scoring needs per sample, rows of samples.
    advantages: what the loss weighs the samples with, rows of samples.
  """

  shared: Any  # [G, ...]
  recorded: experience.Recorded  # [B, ...]
  advantages: returns.Advantages  # [B]


@flax.struct.dataclass
class Gradients:
  """The loss of some samples and its gradient; sums, but for the mismatches.

  Attributes:
    loss: their share of the loss.
    text: sums of the text terms.
    image: sums of the image terms.
    gradients: gradient of `loss` by the trained parameters.
  """

  loss: jax.Array  # []
  text: objective.TextTerms
  image: objective.FlowTerms
  gradients: types.Params


@flax.struct.dataclass
class LossGradient:
  """A loss and its gradient over all replicas; those of several stages add up, field by field.

  Attributes:
    loss: the loss of one update, or the share of one stage in it.
    gradients: gradient of `loss` by the trained parameters.
    num_terms: T + J, the tokens and images that carry loss; 0 where there is
      nothing to learn from.
    num_nonfinite: how many measurements of the update are not finite, see
      `diagnostics.num_nonfinite`; the update is skipped unless it is 0.
  """

  loss: jax.Array  # []
  gradients: types.Params
  num_terms: jax.Array  # [] int32
  num_nonfinite: jax.Array  # [] int32


def gradients(
  policy: types.Params,
  reference: types.Params | None,
  forward: Forward,
  micro_batches: Batch,
  totals: tuple[jax.Array, jax.Array],
  flow: rollout_settings.FlowSettings,
  loss: iteration_settings.LossSettings,
) -> Gradients:
  """Returns this replica's share of the loss and its gradient.

  Args:
    policy: trained parameters, to differentiate by.
    reference: trained parameters that the KL is taken to; None where the
      objective has no KL.
    forward: scores recorded samples.
    micro_batches: this replica's samples, with a leading axis of micro-batches.
    totals: T and J, the tokens and images that carry loss, over all replicas.
    flow: how the stage's images were sampled.
    loss: weights of the objective.
  """
  num_tokens, num_images = totals

  def loss_of(
    policy: types.Params, anchor: scoring.Outputs | None, batch: Batch
  ) -> tuple[jax.Array, tuple[objective.TextTerms, objective.FlowTerms]]:
    outputs = forward(policy, batch.shared, batch.recorded)
    if anchor is None:
      # The KL of a policy to itself is 0 and has no gradient.
      anchor = jax.lax.stop_gradient(outputs)
    advantages = batch.advantages
    text = objective.text_terms(
      outputs.logprob,
      anchor.logprob,
      batch.recorded.text,
      advantages.text,
      advantages.counts,
      loss.clip_range,
    )
    image = objective.flow_terms(
      outputs.velocity,
      anchor.velocity,
      batch.recorded.trajectory,
      flow,
      advantages.image,
      advantages.counts,
      loss.image_clip_range,
    )
    value = objective.total(text, image, num_tokens, num_images, loss)
    return value, (text, image)

  def gradients_of(batch: Batch) -> Gradients:
    # Outside of the differentiated function: no gradient flows into the reference.
    anchor = None
    if reference is not None:
      anchor = forward(reference, batch.shared, batch.recorded)
    differentiate = jax.value_and_grad(loss_of, has_aux=True)
    (value, (text, image)), gradient = differentiate(policy, anchor, batch)
    return Gradients(value, text, image, gradient)

  return _sum_over(micro_batches, gradients_of)


def _sum_over(
  micro_batches: Batch, gradients_of: Callable[[Batch], Gradients]
) -> Gradients:
  """Adds up the gradients of micro-batches, the leading axis of `micro_batches`."""
  # All micro-batches have the same shapes, so that one compiled body serves them.
  num_micro_batches = micro_batches.advantages.counts.shape[0]
  first = jax.tree.map(lambda x: x[0], micro_batches)
  if num_micro_batches == 1:
    return gradients_of(first)

  # One after the other: the activations of one micro-batch are in memory at a time.
  def add_micro_batch(accumulated: Gradients, batch: Batch):
    return _added(accumulated, gradients_of(batch)), None

  shapes = jax.eval_shape(gradients_of, first)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  accumulated, _ = jax.lax.scan(add_micro_batch, zeros, micro_batches)
  return accumulated


def over_replicas(share: Gradients) -> Gradients:
  """Adds up the shares of all replicas, inside the mapped step."""
  summed = collectives.psum(share, placement.AXIS)
  text_mismatch, image_mismatch = collectives.pmax(
    (share.text.mismatch, share.image.mismatch), placement.AXIS
  )
  return _with_mismatches(summed, text_mismatch, image_mismatch)


def _added(first: Gradients, second: Gradients) -> Gradients:
  summed = jax.tree.map(jnp.add, first, second)
  return _with_mismatches(
    summed,
    jnp.maximum(first.text.mismatch, second.text.mismatch),
    jnp.maximum(first.image.mismatch, second.image.mismatch),
  )


def _with_mismatches(
  summed: Gradients, text_mismatch: jax.Array, image_mismatch: jax.Array
) -> Gradients:
  """Replaces the sums of the mismatches by their maxima."""
  return dataclasses.replace(
    summed,
    text=dataclasses.replace(summed.text, mismatch=text_mismatch),
    image=dataclasses.replace(summed.image, mismatch=image_mismatch),
  )

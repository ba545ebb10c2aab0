"""The objective of one update over sampled texts and SDE steps (docs/algorithm.md#objective).

Terms are sums over samples, so that they add up over micro-batches and replicas; `total` divides
them by the numbers of tokens and images of the whole update.
"""

import flax.struct
import jax
import jax.numpy as jnp

from r3jax import types
from r3jax.agent import experience
from r3jax.agent import rollout_settings
from r3jax.rl import iteration_settings
from r3jax.rl import losses
from r3jax.sampling import flow_matching

# The reference drops the text KL of a whole batch if its mean is larger. Here the term stays, and
# the tokens whose own k3 term is larger are counted.
EXTREME_KL = 10


@flax.struct.dataclass
class TextTerms:
  """Sums over the tokens that carry loss; scalars.

  Attributes:
    policy: clipped policy terms.
    kl: k3 terms.
    ratio: ratios ρ.
    entropy: -behavior_logprob.
    num_clipped: tokens whose ratio is outside the clip range.
    num_tokens: tokens that carry loss.
    num_extreme_kl: tokens whose k3 term is above 10.
    mismatch: max |ρ - 1|, the only field that is a maximum and no sum.
  """

  policy: jax.Array
  kl: jax.Array
  ratio: jax.Array
  entropy: jax.Array
  num_clipped: jax.Array
  num_tokens: jax.Array
  num_extreme_kl: jax.Array
  mismatch: jax.Array


@flax.struct.dataclass
class FlowTerms:
  """Sums over the images that carry loss; scalars.

  Attributes:
    policy: clipped policy terms.
    kl: KL terms, each a mean over the image's tokens.
    ratio: ratios ρ.
    deviation: |ρ - 1|.
    num_clipped: images whose ratio is outside the clip range.
    num_images: images that carry loss.
    mismatch: max |ρ - 1|, the only field that is a maximum and no sum.
  """

  policy: jax.Array
  kl: jax.Array
  ratio: jax.Array
  deviation: jax.Array
  num_clipped: jax.Array
  num_images: jax.Array
  mismatch: jax.Array


def _masked_sum(x: jax.Array, mask: jax.Array) -> jax.Array:
  return jnp.sum(jnp.where(mask, x, 0.0))


def _largest_mismatch(log_ratio: jax.Array, mask: jax.Array) -> jax.Array:
  mismatch = jnp.abs(jnp.exp(log_ratio) - 1)
  return jnp.max(jnp.where(mask, mismatch, 0.0))


def _num_clipped(
  log_ratio: jax.Array, mask: jax.Array, clip_range: float
) -> jax.Array:
  mismatch = jnp.abs(jnp.exp(log_ratio) - 1)
  return jnp.sum(mask & (mismatch > clip_range))


def text_count(text: experience.Text, counts: types.Flags) -> jax.Array:
  """Returns T of this replica, the number of tokens that carry loss, [] int32.

  Args:
    text: sampled segments.
    counts: samples that take part in the update.
  """
  mask = losses.token_mask(text.lengths, text.ids.shape[1])
  return jnp.sum(mask & counts[:, None])


def image_count(
  flow: rollout_settings.FlowSettings, counts: types.Flags
) -> jax.Array:
  """Returns J of this replica, the number of images that carry loss, [] int32.

  Images of samples that stopped are among them; their advantage is 0.
  """
  if not flow.sde_index_max:
    return jnp.int32(0)  # an ODE step has no probability
  return jnp.sum(counts)


def text_terms(
  logprob: jax.Array,
  reference_logprob: jax.Array,
  text: experience.Text,
  advantage: types.PerSample,
  counts: types.Flags,
  clip_range: float,
) -> TextTerms:
  """Sums the text terms of this replica's samples (docs/algorithm.md#text-loss).

  Args:
    logprob: [B, T - 1] under the policy.
    reference_logprob: [B, T - 1] under the reference; equal to `logprob` where
      there is none.
    text: the sampled segments, with their behavior log-probs.
    advantage: A of every sample.
    counts: samples that take part in the update.
    clip_range: c.
  """
  mask = losses.token_mask(text.lengths, text.ids.shape[1]) & counts[:, None]
  # Masked before the exponential: an overflow in a masked entry would make its gradient NaN.
  log_ratio = jnp.where(mask, logprob - text.behavior_logprob, 0.0)
  scored_logprob = jnp.where(mask, logprob, reference_logprob)
  kl = losses.k3(scored_logprob, reference_logprob)
  policy = losses.clipped_policy(log_ratio, advantage[:, None], clip_range)
  return TextTerms(
    policy=_masked_sum(policy, mask),
    kl=_masked_sum(kl, mask),
    ratio=_masked_sum(jnp.exp(log_ratio), mask),
    entropy=-_masked_sum(text.behavior_logprob, mask),
    num_clipped=_num_clipped(log_ratio, mask, clip_range),
    num_tokens=jnp.sum(mask),
    num_extreme_kl=jnp.sum(mask & (kl > EXTREME_KL)),
    mismatch=_largest_mismatch(log_ratio, mask),
  )


def flow_terms(
  velocity: types.Latent,
  reference_velocity: types.Latent,
  trajectory: flow_matching.Trajectory,
  flow: rollout_settings.FlowSettings,
  advantage: types.PerSample,
  counts: types.Flags,
  clip_range: float,
) -> FlowTerms:
  """Sums the image terms of this replica's samples (docs/algorithm.md#image-loss).

  The objective is that of Flow-GRPO (arXiv 2505.05470): the ratio compares the densities of the
  recorded next latent. A stage that samples by ODE only (`flow.sde_index_max` 0) has no terms.

  Args:
    velocity: guided velocity under the policy, at the latent before the SDE
      step.
    reference_velocity: the same under the reference; equal to `velocity` where
      there is none.
    trajectory: the sampled trajectories, with their behavior log-probs.
    flow: how they were sampled.
    advantage: A of every sample.
    counts: samples that take part in the update.
    clip_range: c of images.
  """
  if not flow.sde_index_max:
    # The recorded t is 0, and `sde_moments` divides by it.
    return FlowTerms(
      policy=jnp.zeros(()),
      kl=jnp.zeros(()),
      ratio=jnp.zeros(()),
      deviation=jnp.zeros(()),
      num_clipped=jnp.zeros((), jnp.int32),
      num_images=jnp.zeros((), jnp.int32),
      mismatch=jnp.zeros(()),
    )
  # One density for each policy, with the same standard deviation.
  t = trajectory.t
  dt = trajectory.dt
  eta = flow.eta(t)
  mean, std = flow_matching.sde_moments(trajectory.before, velocity, t, dt, eta)
  reference_mean, _ = flow_matching.sde_moments(
    trajectory.before, reference_velocity, t, dt, eta
  )
  # Means over tokens and not sums, so that clip range and KL weight do not depend on the size.
  token_logprob = flow_matching.token_logprob(trajectory.after, mean, std)
  logprob = token_logprob.mean(axis=-1)
  log_ratio = jnp.where(counts, logprob - trajectory.behavior_logprob, 0.0)
  kl = flow_matching.token_kl(mean, reference_mean, std).mean(axis=-1)
  policy = losses.clipped_policy(log_ratio, advantage, clip_range)
  return FlowTerms(
    policy=_masked_sum(policy, counts),
    kl=_masked_sum(kl, counts),
    ratio=_masked_sum(jnp.exp(log_ratio), counts),
    deviation=_masked_sum(jnp.abs(jnp.exp(log_ratio) - 1), counts),
    num_clipped=_num_clipped(log_ratio, counts, clip_range),
    num_images=jnp.sum(counts),
    mismatch=_largest_mismatch(log_ratio, counts),
  )


def total(
  text: TextTerms,
  image: FlowTerms,
  num_tokens: jax.Array,
  num_images: jax.Array,
  loss: iteration_settings.LossSettings,
) -> jax.Array:
  """Returns the loss of some samples, []; the losses of all samples add up to that of the update.

    w_text (P_text + β_text K_text) / (T + 1e-4)
    + w_image P_image / (J + 1e-4)
    + β_image K_image / max(J, 1)

  P are the sums of policy terms and K those of KL terms; the weights are `text_weight`, `text_kl`,
  `image_weight` and `image_kl`. The text KL stands inside the text weight, the image KL does not
  stand inside the image weight (docs/algorithm.md#objective).

  Args:
    text: sums over the texts of the samples.
    image: sums over their images.
    num_tokens: T, over all replicas.
    num_images: J, over all replicas.
    loss: weights.
  """
  # T and J are totals of the update, so that every token weighs the same on any replica.
  text_sum = text.policy + loss.text_kl * text.kl
  text_loss = text_sum / (num_tokens + losses.EPSILON)
  image_loss = image.policy / (num_images + losses.EPSILON)
  image_kl = image.kl / jnp.maximum(num_images, 1)
  return (
    loss.text_weight * text_loss
    + loss.image_weight * image_loss
    + loss.image_kl * image_kl
  )

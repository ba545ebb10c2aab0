"""The objective of one update over sampled text and sampled flow steps (R3.md section 8)."""

import flax.struct
import jax
import jax.numpy as jnp

from r3jax import types
from r3jax.agent import experience
from r3jax.agent import rollout_settings
from r3jax.rl import iteration_settings
from r3jax.rl import losses
from r3jax.sampling import flow_matching


@flax.struct.dataclass
class TextTerms:
  """Sums over this replica's tokens; `mismatch` is a maximum."""

  policy: jax.Array  # sum of clipped policy terms
  kl: jax.Array  # sum of k3
  ratio: jax.Array  # sum of the ratios
  entropy: jax.Array  # sum of -behavior_logprob
  clipped: jax.Array  # tokens whose ratio left the clip range
  tokens: jax.Array  # valid tokens
  extreme_kl: jax.Array  # tokens with a KL above 10 (the reference drops those)
  mismatch: jax.Array  # max |ratio - 1|


@flax.struct.dataclass
class FlowTerms:
  """Sums over this replica's images; `mismatch` is a maximum."""

  policy: jax.Array
  kl: jax.Array  # sum over images of the mean over tokens
  ratio: jax.Array  # sum of the ratios
  clipped: jax.Array
  images: jax.Array
  mismatch: jax.Array


def _ratio(log_ratio: jax.Array, valid: jax.Array) -> jax.Array:
  return jnp.sum(jnp.where(valid, jnp.exp(log_ratio), 0.0))


def _mismatch(log_ratio: jax.Array, valid: jax.Array) -> jax.Array:
  return jnp.max(jnp.where(valid, jnp.abs(jnp.exp(log_ratio) - 1), 0.0))


def _clipped(
  log_ratio: jax.Array, valid: jax.Array, clip_range: float
) -> jax.Array:
  return jnp.sum(valid & (jnp.abs(jnp.exp(log_ratio) - 1) > clip_range))


def text_count(text: experience.Text, valid: types.Flags) -> jax.Array:
  """Returns T of this replica: the tokens that carry loss."""
  return jnp.sum(
    losses.token_mask(text.lengths, text.ids.shape[1]) & valid[:, None]
  )


def image_count(
  flow: rollout_settings.FlowSettings, valid: types.Flags
) -> jax.Array:
  """Returns J of this replica: the images that carry loss."""
  return jnp.sum(valid) if flow.sde_index_max else jnp.int32(0)


def text_terms(
  logprob: jax.Array,
  reference_logprob: jax.Array,
  text: experience.Text,
  advantage: types.PerSample,
  valid: types.Flags,
  clip_range: float,
) -> TextTerms:
  """Sums the text terms of this replica's samples.

  Args:
    logprob: [B, T - 1] under the current policy.
    reference_logprob: [B, T - 1] under the reference; equal to `logprob` where there is none.
    text: the rollout.
    advantage: [B].
    valid: [B] samples that count.
    clip_range: c.
  """
  mask = losses.token_mask(text.lengths, text.ids.shape[1]) & valid[:, None]
  log_ratio = jnp.where(mask, logprob - text.behavior_logprob, 0.0)
  kl = losses.k3(jnp.where(mask, logprob, reference_logprob), reference_logprob)
  policy = losses.clipped_policy(log_ratio, advantage[:, None], clip_range)
  return TextTerms(
    policy=jnp.sum(jnp.where(mask, policy, 0.0)),
    kl=jnp.sum(jnp.where(mask, kl, 0.0)),
    ratio=_ratio(log_ratio, mask),
    entropy=-jnp.sum(jnp.where(mask, text.behavior_logprob, 0.0)),
    clipped=_clipped(log_ratio, mask, clip_range),
    tokens=jnp.sum(mask),
    extreme_kl=jnp.sum(mask & (kl > 10)),
    mismatch=_mismatch(log_ratio, mask),
  )


def flow_terms(
  velocity: types.Latent,
  reference_velocity: types.Latent,
  trajectory: flow_matching.Trajectory,
  flow: rollout_settings.FlowSettings,
  advantage: types.PerSample,
  valid: types.Flags,
  clip_range: float,
) -> FlowTerms:
  """Sums the image terms of this replica's samples at their SDE step; arguments as `text_terms`.

  A stage that samples by ODE only (`flow.sde_index_max` 0) has no image terms.
  """
  if not flow.sde_index_max:
    return FlowTerms(
      *[jnp.zeros(())] * 3, *[jnp.zeros((), jnp.int32)] * 2, jnp.zeros(())
    )
  t, dt = trajectory.t, trajectory.dt
  moments = lambda v: flow_matching.sde_moments(
    trajectory.before, v, t, dt, flow.eta(t)
  )
  (mean, std), (reference_mean, _) = (
    moments(velocity),
    moments(reference_velocity),
  )
  logprob = flow_matching.token_logprob(trajectory.after, mean, std).mean(
    axis=-1
  )
  log_ratio = jnp.where(valid, logprob - trajectory.behavior_logprob, 0.0)
  kl = flow_matching.token_kl(mean, reference_mean, std).mean(axis=-1)
  policy = losses.clipped_policy(log_ratio, advantage, clip_range)
  return FlowTerms(
    policy=jnp.sum(jnp.where(valid, policy, 0.0)),
    kl=jnp.sum(jnp.where(valid, kl, 0.0)),
    ratio=_ratio(log_ratio, valid),
    clipped=_clipped(log_ratio, valid, clip_range),
    images=jnp.sum(valid),
    mismatch=_mismatch(log_ratio, valid),
  )


def total(
  text: TextTerms,
  images: FlowTerms,
  tokens: jax.Array,
  count: jax.Array,
  loss: iteration_settings.LossSettings,
) -> jax.Array:
  """Returns this replica's share of the loss; the shares add up over replicas.

    text_weight (policy + text_kl KL) / (T + 1e-4) + image_weight policy / (J + 1e-4) + image_kl KL / J

  Args:
    text, images: this replica's sums.
    tokens: T, over all replicas.
    count: J, over all replicas.
    loss: weights.
  """
  text_loss = (text.policy + loss.text_kl * text.kl) / (tokens + losses.EPSILON)
  image_loss = images.policy / (count + losses.EPSILON)
  image_kl = images.kl / jnp.maximum(count, 1)
  return (
    loss.text_weight * text_loss
    + loss.image_weight * image_loss
    + loss.image_kl * image_kl
  )

"""Finds the numbers that are not finite: in the samples of an iteration, in any tree of arrays."""

import jax
import jax.numpy as jnp

from r3jax.agent import experience
from r3jax.rl import stage_outputs
from r3jax.sampling import flow_matching

# What a stage samples -> how many of its numbers are NaN or infinite, [B] int32.
RowCounts = dict[str, jax.Array]

_TOKENS = "log-probs of the sampled tokens"
_BEFORE = "latents before the SDE step"
_AFTER = "latents after the SDE step"
_STEP = "log-prob of the SDE step"
_LATENT = "latents at t = 0"
_IMAGE = "image"
# Stages, and the quantities of each, in the order in which an iteration computes them.
_ORDER = (
  *("reason", "edit"),
  *(_TOKENS, _BEFORE, _AFTER, _STEP, _LATENT, _IMAGE),
)


def per_row(x: jax.Array) -> jax.Array:
  """Returns how many numbers of every row are NaN or infinite, [B] int32."""
  axes = tuple(range(1, x.ndim))
  return jnp.sum(~jnp.isfinite(x), axis=axes, dtype=jnp.int32)


def count(x: jax.Array) -> jax.Array:
  """Returns how many numbers of an array are NaN or infinite, [] int32."""
  return jnp.sum(~jnp.isfinite(x), dtype=jnp.int32)


def _of_flow(
  trajectory: flow_matching.Trajectory, is_finite: jax.Array
) -> RowCounts:
  """Counts in what a stage records of its images."""
  return {
    _BEFORE: per_row(trajectory.before),
    _AFTER: per_row(trajectory.after),
    _STEP: per_row(trajectory.behavior_logprob),
    _LATENT: per_row(trajectory.latent),
    _IMAGE: (~is_finite).astype(jnp.int32),
  }


def _of_text(text: experience.Text) -> RowCounts:
  """Counts in what a stage records of its texts."""
  return {_TOKENS: per_row(text.behavior_logprob)}


def of_samples(samples: stage_outputs.Samples) -> dict[str, RowCounts]:
  """Returns, for "reason" and "edit", how many numbers of every sample are not finite.

  Args:
    samples: of an iteration; its edits are those of the last round.
  """
  rollout = samples.drafts.rollout
  counts = {
    "reason": _of_text(rollout.text)
    | _of_flow(rollout.trajectory, rollout.is_finite)
  }
  edits = samples.edits
  if edits is not None:
    refined = edits.refined
    counts["edit"] = _of_text(edits.text) | _of_flow(
      refined.trajectory, refined.is_finite
    )
  return counts


def in_order(counts: dict) -> dict:
  """Returns `of_samples`, or the counts of one of its stages, in the order of the computation.

  The first quantity above 0 is then where it began; a compiled program sorts its dictionaries.
  """
  return {name: counts[name] for name in _ORDER if name in counts}

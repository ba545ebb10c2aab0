"""Metrics of an iteration, over all groups and replicas; docs/metrics.md says what each one means.

All functions are pure: they read tables [G, M] and sums that were taken over all replicas. Means
are over valid samples unless a comment says otherwise.
"""

import jax
import jax.numpy as jnp

from r3jax import types
from r3jax.rl import group_table
from r3jax.rl import objective
from r3jax.rl import pools
from r3jax.rl import returns
from r3jax.rl import train_state

Metrics = dict[str, jax.Array]

# Scores of the other members from which on `_left_out` calls an image good.
_HIGH = 0.5
_EARLY = 0.9  # SDE steps that start at a later t count as early: the image is still noise


def _mean(value: jax.Array, where: jax.Array) -> jax.Array:
  """Returns the mean of the chosen entries, NaN where there are none."""
  chosen = jnp.where(where, value, 0.0).astype(float)
  return jnp.sum(chosen) / jnp.sum(where)


def _group_spread(
  value: group_table.Values, valid: group_table.Flags
) -> jax.Array:
  """Returns the standard deviation inside every group, [G]; 0 where nothing is valid."""
  # That of the population (n), unlike the one that advantages may be divided by (n - 1).
  num_valid = jnp.maximum(valid.sum(axis=1), 1)
  value = value.astype(float)
  mean = jnp.sum(jnp.where(valid, value, 0.0), axis=1) / num_valid
  square = jnp.where(valid, (value - mean[:, None]) ** 2, 0.0)
  return jnp.sqrt(square.sum(axis=1) / num_valid)


def _reward_parts(table: group_table.GroupTable) -> Metrics:
  """Returns the mean of every part of the reward, over the samples that have the part."""
  return {
    name: _mean(part, table.valid & jnp.isfinite(part))
    for name, part in table.parts.items()
  }


def _left_out(table: group_table.GroupTable, scored: jax.Array) -> Metrics:
  """Returns how often a member of a sum has no verdict, by the score of the other members.

  A judge that leaves out the bad images biases what is learned; one that fails by chance does not.

  Args:
    table: parts of the reward, -inf where a member calls an image invalid.
    scored: [G, M] whether a sample's image was scored in this stage.
  """
  # The members of a sum, see `rewards.combine.weighted_sum`; nested ones count with their sum.
  members = [
    name
    for name in table.parts
    if "/" not in name and f"{name}/strict" in table.parts
  ]
  metrics = {}
  for name in members:
    others = [table.parts[other] for other in members if other != name]
    if not others:
      continue
    score = jnp.mean(jnp.stack(others), axis=0)
    has_score = scored & jnp.isfinite(score)
    is_high = score >= _HIGH
    invalid = jnp.isneginf(table.parts[name])
    metrics[f"{name}/invalid_when_low"] = _mean(invalid, has_score & ~is_high)
    metrics[f"{name}/invalid_when_high"] = _mean(invalid, has_score & is_high)
  return metrics


def _images(table: group_table.GroupTable) -> Metrics:
  """Returns the share of images that are made of NaN or infinities; over all samples."""
  return {"nonfinite_images": jnp.mean(~table.is_finite)}


def _texts(table: group_table.GroupTable) -> Metrics:
  """Returns how long texts are, and the share that the limit ended; over all samples."""
  return {
    "tokens": jnp.mean(table.num_tokens.astype(float)),
    "tokens_at_limit": jnp.mean(table.at_limit),
  }


def _rewards(
  table: group_table.GroupTable, advantages: returns.Advantages
) -> Metrics:
  # Without a spread there is nothing to learn from: all advantages of the group are 0.
  spread = _group_spread(table.reward, table.valid)
  return {
    "score": _mean(table.reward, table.valid),
    "valid": jnp.mean(table.valid),
    "score_spread": jnp.mean(spread),
    "text_advantage": _mean(jnp.abs(advantages.text), table.valid),
    "image_advantage": _mean(jnp.abs(advantages.image), table.valid),
  }


def reason(
  table: group_table.ReasonTable, advantages: returns.Advantages
) -> Metrics:
  """Measures the reason stage.

  Args:
    table: the stage's samples.
    advantages: [G, M] of the same samples.
  """
  every_sample = jnp.ones_like(table.valid)
  spread = _group_spread(table.reward, table.valid)
  # A group shares its SDE step, so that the spread is due to the noise of that step alone.
  sde_time = table.sde_time[:, 0]
  is_early = sde_time > _EARLY
  is_late = (sde_time > 0) & (sde_time <= _EARLY)
  return {
    # First, so that a part with the name of a metric below does not replace it.
    **_reward_parts(table),
    **_left_out(table, every_sample),
    "format": _mean(table.format_reward, every_sample),
    **_texts(table),
    **_images(table),
    **_rewards(table, advantages),
    "spread_sde_early": _mean(spread, is_early),
    "spread_sde_late": _mean(spread, is_late),
  }


def edit(
  table: group_table.EditTable, advantages: returns.Advantages
) -> Metrics:
  """Measures the reflect and refine stages.

  Args:
    table: the stages' samples.
    advantages: [G, M] of the same samples.
  """
  valid = table.valid
  stop = table.stop
  every_sample = jnp.ones_like(valid)
  num_groups = valid.shape[0]
  # Shares of edits that helped and of stops that were right, see docs/metrics.md.
  change = table.reward - table.reward_before
  was_perfect = table.reward_before == 1
  is_drawn = jnp.isin(jnp.arange(num_groups), table.prompt_index)
  return {
    # First, so that a part with the name of a metric below does not replace it.
    **_reward_parts(table),
    **_left_out(table, ~stop),
    "format": _mean(table.format_reward, every_sample),
    **_texts(table),
    **_images(table),
    "truncated": _mean(table.truncated, every_sample),
    "before": _mean(table.reward_before, valid),
    "edit_rate": _mean(~stop, every_sample),
    "improvement": _mean(change, valid & ~stop),
    "improved": _mean(change > 0, valid),
    "worse": _mean(change < 0, valid),
    "stop_when_right": _mean(stop, valid & was_perfect),
    "stop_when_wrong": _mean(stop, valid & ~was_perfect),
    "stop_precision": _mean(was_perfect, valid & stop),
    "pool_perfect": _mean(was_perfect, valid),
    "pool_prompts": jnp.mean(is_drawn),
    **_rewards(table, advantages),
  }


def pool(pool: pools.ScoredImages) -> Metrics:
  """Measures what groups may draw: the shares of images that are right, wrong and unscored."""
  is_right = pool.valid & (pool.reward == 1)
  return {
    "right": jnp.mean(is_right),
    "wrong": jnp.mean(pool.valid & ~is_right),
    "unscored": jnp.mean(~pool.valid),
  }


# What is measured of the update of every stage, beside the mismatches.
UPDATE_METRICS = (
  "loss",
  "text_policy",
  "text_kl",
  "text_entropy",
  "text_ratio",
  "image_policy",
  "image_kl",
  "image_ratio",
  "image_ratio_deviation",
  "gradient_norm",
  "gradient_norm_und",
  "gradient_norm_gen",
)


def update(
  text: objective.TextTerms,
  image: objective.FlowTerms,
  gradients: types.Params,
) -> Metrics:
  """Measures one update; terms and gradients are sums over all replicas."""
  num_tokens = jnp.maximum(text.num_tokens, 1)
  num_images = jnp.maximum(image.num_images, 1)
  return {
    "text_policy": text.policy / num_tokens,
    "text_kl": text.kl / num_tokens,
    "text_kl_extreme": text.num_extreme_kl,
    "text_entropy": text.entropy / num_tokens,
    "text_ratio": text.ratio / num_tokens,
    "text_clipped": text.num_clipped / num_tokens,
    "image_policy": image.policy / num_images,
    "image_kl": image.kl / num_images,
    "image_ratio": image.ratio / num_images,
    "image_ratio_deviation": image.deviation / num_images,
    "image_clipped": image.num_clipped / num_images,
    **gradient_norms(gradients),
    "mismatch_text": text.mismatch,
    "mismatch_image": image.mismatch,
  }


def num_nonfinite(metrics: Metrics) -> jax.Array:
  """Returns how many of an update's measurements are NaN or infinite, [] int32.

  Sums and norms are not finite as soon as one of their terms is not, so that a few numbers speak
  for every log-prob, ratio and gradient; over all replicas, so that all replicas agree. A maximum
  over replicas may leave out NaN.

  Args:
    metrics: loss, terms and norms of an update, scalars.
  """
  is_nonfinite = [~jnp.isfinite(value) for value in metrics.values()]
  return jnp.sum(jnp.stack(is_nonfinite), dtype=jnp.int32)


def skipped(num_nonfinite: jax.Array) -> jax.Array:
  """Returns 1 where an update is not made because it is not finite, else 0, [] float32."""
  return jnp.minimum(num_nonfinite, 1).astype(jnp.float32)


def gradient_norms(gradients: types.Params) -> Metrics:
  """Measures the gradient of a loss, and which half of the model it would change."""
  # Every gradient is read once; a norm adds up some of the squares.
  squares = jax.tree.map(_sum_of_squares, gradients)
  labels = train_state.expert_labels(gradients)

  def norm(*experts: str) -> jax.Array:
    pairs = zip(jax.tree.leaves(squares), jax.tree.leaves(labels), strict=True)
    return jnp.sqrt(sum(square for square, label in pairs if label in experts))

  return {
    "gradient_norm": norm("und", "gen"),
    "gradient_norm_und": norm("und"),
    "gradient_norm_gen": norm("gen"),
  }


def _sum_of_squares(gradient: jax.Array) -> jax.Array:
  return jnp.sum(jnp.square(gradient))

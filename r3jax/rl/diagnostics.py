"""Metrics of an iteration, over all groups and replicas; means are over valid samples."""

import jax
import jax.numpy as jnp
import optax

from r3jax import types
from r3jax.agent import experience
from r3jax.parallel import collectives
from r3jax.rl import objective
from r3jax.rl import placement
from r3jax.rl import train_state

Metrics = dict[str, jax.Array]


def _mean(value: jax.Array, where: jax.Array) -> jax.Array:
  """Returns the mean of the chosen entries, NaN where there are none."""
  return jnp.sum(jnp.where(where, value, 0.0).astype(float)) / jnp.sum(where)


def _group_spread(value: jax.Array, valid: jax.Array) -> jax.Array:
  """Returns the standard deviation inside every group of [G, M], [G]."""
  count, value = jnp.maximum(valid.sum(axis=1), 1), value.astype(float)
  mean = jnp.sum(jnp.where(valid, value, 0.0), axis=1) / count
  square = jnp.where(valid, (value - mean[:, None]) ** 2, 0.0)
  return jnp.sqrt(square.sum(axis=1) / count)


def _common(
  place, score: types.Score, valid, text_advantage, image_advantage
) -> Metrics:
  valid = place.by_group(valid)
  value = place.by_group(score.value)
  spread = _group_spread(value, valid)
  found = {
    "score": _mean(value, valid),
    "valid": jnp.mean(valid),
    "score_spread": jnp.mean(spread),
    "text_advantage": _mean(jnp.abs(place.by_group(text_advantage)), valid),
    "image_advantage": _mean(jnp.abs(place.by_group(image_advantage)), valid),
  }
  return found


def _parts(place, score: types.Score, valid: jax.Array) -> Metrics:
  """Returns the means of the score's parts, where they are there: a kept image may lack them."""
  known = lambda part: place.by_group(valid & jnp.isfinite(part))
  return {
    name: _mean(place.by_group(part), known(part))
    for name, part in score.parts.items()
  }


def _lengths(place, text: experience.Text) -> Metrics:
  """Returns how long texts are, and how many of them the limit ended."""
  lengths = place.by_group(text.lengths)
  return {
    "tokens": jnp.mean(lengths.astype(float)),
    "tokens_at_limit": jnp.mean(lengths == text.ids.shape[1]),
  }


def _spread_by_index(place, score: types.Score, t: jax.Array) -> Metrics:
  """Returns the mean spread of the score inside the groups whose SDE step was early or late."""
  spread = _group_spread(
    place.by_group(score.value), place.by_group(score.valid)
  )
  time = place.by_group(t)[:, 0]
  return {
    "spread_sde_early": _mean(spread, time > 0.9),
    "spread_sde_late": _mean(spread, (time > 0) & (time <= 0.9)),
  }


def reason(
  place: placement.Placement,
  drafts,
  score: types.Score,
  text_advantage,
  image_advantage,
) -> Metrics:
  """Measures the reason stage; `drafts` and `score` are this replica's."""
  every = jnp.ones((place.groups, place.group_size), bool)
  return {
    # first: a part may have a name of ours
    **_parts(place, score, score.valid),
    "format": _mean(place.by_group(drafts.format), every),
    **_lengths(place, drafts.rollout.text),
    **_common(place, score, score.valid, text_advantage, image_advantage),
    **_spread_by_index(place, score, drafts.rollout.flow.t),
  }


def edit(
  place: placement.Placement,
  edits,
  score: types.Score,
  text_advantage,
  image_advantage,
) -> Metrics:
  """Measures the reflect and refine stages; `edits` and `score` are this replica's."""
  by_group = place.by_group
  every = jnp.ones((place.groups, place.group_size), bool)
  valid = score.valid & edits.before_valid
  known, stop = by_group(valid), by_group(edits.parsed.stop)
  before, after = by_group(edits.before), by_group(score.value)
  change, right = after - before, before == 1
  return {
    **_parts(place, score, valid),  # first: a part may have a name of ours
    "format": _mean(by_group(edits.parsed.format), every),
    **_lengths(place, edits.text),
    "truncated": _mean(by_group(edits.parsed.truncated), every),
    "before": _mean(before, known),
    "edit_rate": _mean(~stop, every),
    "improvement": _mean(change, known & ~stop),
    "improved": _mean(change > 0, known),
    "worse": _mean(change < 0, known),
    "stop_when_right": _mean(stop, known & right),
    "stop_when_wrong": _mean(stop, known & ~right),
    "stop_precision": _mean(right, known & stop),
    "pool_perfect": _mean(right, known),
    "pool_prompts": jnp.mean(
      jnp.isin(jnp.arange(place.groups), by_group(edits.row))
    ),
    **_common(place, score, valid, text_advantage, image_advantage),
  }


def pool(score: jax.Array, valid: jax.Array) -> Metrics:
  """Measures what groups may draw: the shares of images that are right, wrong and without a score.

  Args:
    score: [P] of every image.
    valid: [P] whether the score is there.
  """
  right = valid & (score == 1)
  return {
    "right": jnp.mean(right),
    "wrong": jnp.mean(valid & ~right),
    "unscored": jnp.mean(~valid),
  }


def update(
  text: objective.TextTerms, images: objective.FlowTerms, gradients
) -> Metrics:
  """Measures one update; the terms are this replica's, the gradients already summed."""
  text_sum, image_sum = collectives.total((text, images), placement.AXIS)
  text_mismatch, image_mismatch = collectives.largest(
    (text.mismatch, images.mismatch), placement.AXIS
  )
  tokens, count = (
    jnp.maximum(text_sum.tokens, 1),
    jnp.maximum(image_sum.images, 1),
  )
  labels = train_state.expert_labels(gradients)
  part = lambda name: jax.tree.map(
    lambda g, label: g * (label == name), gradients, labels
  )
  return {
    "text_policy": text_sum.policy / tokens,
    "text_kl": text_sum.kl / tokens,
    "text_kl_extreme": text_sum.extreme_kl,
    "text_entropy": text_sum.entropy / tokens,
    "text_ratio": text_sum.ratio / tokens,
    "text_clipped": text_sum.clipped / tokens,
    "image_policy": image_sum.policy / count,
    "image_kl": image_sum.kl / count,
    "image_ratio": image_sum.ratio / count,
    "image_clipped": image_sum.clipped / count,
    "gradient_norm": optax.tree.norm(gradients),
    "gradient_norm_und": optax.tree.norm(part("und")),
    "gradient_norm_gen": optax.tree.norm(part("gen")),
    "mismatch_text": text_mismatch,
    "mismatch_image": image_mismatch,
  }

"""Tests that scoring gives what sampling recorded, in the dtype that BAGEL-7B runs in."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import r3_geneval
from r3jax.agent import actors
from r3jax.agent import experience
from r3jax.agent import random_keys
from r3jax.agent import rollout
from r3jax.agent import scoring
from r3jax.parallel import meshes
from r3jax.rl import losses
from r3jax.rl import objective
from r3jax.run import setup
from r3jax.sampling import flow_matching

NUM_GROUPS = 8
SAMPLES_PER_GROUP = 16
CHANGES = {
  "model.dtype": "bfloat16",
  "groups_per_step": NUM_GROUPS,
  "group_size": SAMPLES_PER_GROUP,
  "loss.text_kl": 0.0,
  "loss.image_kl": 0.0,
  "reason.text_scale": 1.0,  # less to compile; texts do not see the latents
}


def _keys() -> random_keys.Keys:
  num_samples = NUM_GROUPS * SAMPLES_PER_GROUP
  return random_keys.Keys(
    group=jax.random.split(jax.random.key(0), NUM_GROUPS),
    sample=jax.random.split(jax.random.key(1), num_samples),
  )


def _unrelated_trajectory(latent_shape) -> flow_matching.Trajectory:
  """Returns latents that a pass needs and that no text attends to."""
  latent = jnp.zeros(latent_shape)
  time = jnp.full(latent_shape[0], 0.5)
  return flow_matching.Trajectory(latent, latent, latent, time, time, time)


class TestInBfloat16:
  """The shipped model writes thoughts token by token and scores them in one pass."""

  @pytest.fixture(scope="class")
  @classmethod
  def recorded(cls):
    """(sampled text, its log-probs in the scoring pass)."""
    config = r3_geneval.get_config("shapes")
    config.update_from_flattened_dict(CHANGES)
    experiment = setup.build(config)
    mesh = meshes.make_mesh_on(jax.devices()[:1], 1, 1, 1)
    policy, frozen = experiment.start(mesh, config.seed)
    records = experiment.train[:: len(experiment.train) // NUM_GROUPS]
    encoded = experiment.encode(records[:NUM_GROUPS])
    prompts = dataclasses.replace(encoded, target=None)
    # Nothing is mapped over replicas here.
    text = dataclasses.replace(experiment.rollout.reason_text, axis=None)
    settings = dataclasses.replace(experiment.rollout, reason_text=text)
    modules = experiment.modules
    num_samples = NUM_GROUPS * SAMPLES_PER_GROUP
    num_latents = np.prod(modules.towers.latent_grid)
    latent_shape = (num_samples, num_latents, modules.bagel.config.latent_dim)

    @jax.jit
    def sample(policy, prompts):
      actor = actors.sampler(modules, policy, frozen.towers, settings)
      return rollout.think(actor, prompts, _keys()).text

    @jax.jit
    def score(policy, prompts, text):
      actor = actors.Actor(modules, policy, frozen.towers, settings)
      trajectory = _unrelated_trajectory(latent_shape)
      record = experience.Recorded(text, trajectory)
      return scoring.score_reason(actor, prompts, record).logprob

    text = sample(policy, prompts)
    return text, score(policy, prompts, text)

  def test_ratios_of_tokens_are_near_one(self, recorded):
    """Measured over six seeds: the 99th percentile is 0, the largest at most 0.0065.

    Decoding and scoring add up in another order, and where a sum lies between two bfloat16 numbers
    its rounding differs. Queries and keys that are rounded three times, after product, norm and
    RoPE, give 0.0089 and 0.012; logits that are rounded before the log-prob, too, 0.037 and 0.047.
    """
    text, logprob = recorded
    mask = losses.token_mask(text.lengths, text.ids.shape[1])
    log_ratio = np.asarray(logprob - text.behavior_logprob)[np.asarray(mask)]
    mismatch = np.abs(np.exp(log_ratio) - 1)
    assert mismatch.size > 500
    assert np.quantile(mismatch, 0.99) <= 0.001
    assert mismatch.max() <= 0.008

  def test_metric_is_the_largest_deviation(self, recorded):
    text, logprob = recorded
    num_samples = text.ids.shape[0]
    terms = objective.text_terms(
      logprob,
      logprob,
      text,
      jnp.ones(num_samples),
      jnp.ones(num_samples, bool),
      0.2,
    )
    assert 0 <= float(terms.mismatch) <= 0.008
    assert int(terms.num_clipped) == 0

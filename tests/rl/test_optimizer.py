"""Tests of the optimizer and of what belongs to which expert."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from r3jax.model import parameters
from r3jax.rl import train_state
from tests import goldens_lib

SETTINGS = train_state.OptimizerSettings(
  und_learning_rate=1e-3,
  gen_learning_rate=4e-3,
  warmup_updates=10,
  b1=0.9,
  b2=0.95,
  eps=1e-8,
  weight_decay=0.0,
  clip_norm=1.0,
  freeze_und=False,
)
POLICY = {
  "embed_tokens": {"embedding": jnp.ones(3)},
  "layers": {"und": {"q": jnp.ones(3)}, "gen": {"q": jnp.ones(3)}},
  "llm2vae": {"kernel": jnp.ones(3)},
}
GRADIENT = jax.tree.map(lambda x: jnp.array([0.5, -0.5, 0.25]), POLICY)


def _updates(number: int, **changes) -> list:
  """Returns the first updates under a constant gradient: the rate times its signs."""
  optimizer = train_state.make_optimizer(
    dataclasses.replace(SETTINGS, **changes)
  )
  opt_state, found = optimizer.init(POLICY), []
  step = jax.jit(optimizer.update)
  for _ in range(number):
    update, opt_state = step(GRADIENT, opt_state, POLICY)
    found.append(update)
  return found


class TestMakeOptimizer:
  def test_warms_up_linearly_from_zero(self):
    found = _updates(13)
    for k, update in enumerate(found):
      rate = min(1, k / 10)
      signs = np.array([-1, 1, -1])
      und, gen = update["layers"]["und"]["q"], update["layers"]["gen"]["q"]
      np.testing.assert_allclose(
        und, rate * SETTINGS.und_learning_rate * signs, rtol=1e-4
      )
      np.testing.assert_allclose(
        gen, rate * SETTINGS.gen_learning_rate * signs, rtol=1e-4
      )

  def test_the_first_update_changes_nothing(self):
    (first,) = _updates(1)
    assert not any(np.any(x) for x in jax.tree.leaves(first))

  def test_starts_at_the_full_rate_without_warmup(self):
    (first,) = _updates(1, warmup_updates=0)
    expected = SETTINGS.und_learning_rate * np.array([-1, 1, -1])
    np.testing.assert_allclose(
      first["embed_tokens"]["embedding"], expected, rtol=1e-4
    )

  def test_clips_by_the_norm_of_what_is_trained(self):
    """A frozen und halved the step of gen: its gradient had a part in the norm."""
    settings = dataclasses.replace(
      SETTINGS, warmup_updates=0, eps=1.0, freeze_und=True
    )
    # The norm of gen's gradient is 4, that of both experts' is 5.
    gradient = {
      "layers": {"und": {"q": jnp.array([3.0])}, "gen": {"q": jnp.array([4.0])}}
    }
    _, gen = parameters.split_experts(gradient)
    optimizer = train_state.make_optimizer(settings)
    update, _ = optimizer.update(gen, optimizer.init(gen), gen)
    # Clipped to 1, and Adam's first step is rate * 1 / (1 + eps). By the norm of
    # both it would be clipped to 0.8: 0.00178.
    np.testing.assert_allclose(
      update["layers"]["gen"]["q"], [-0.00200], rtol=1e-6
    )
    assert jax.tree.structure(update) == jax.tree.structure(gen)

  def test_refuses_a_frozen_expert(self):
    optimizer = train_state.make_optimizer(
      dataclasses.replace(SETTINGS, freeze_und=True)
    )
    with pytest.raises(ValueError, match="und"):
      optimizer.init(POLICY)

  @pytest.mark.parametrize("clip_norm, factor", [(0.1, 0.1), (100.0, 1.5)])
  def test_clips_the_global_norm(self, clip_norm, factor):
    norm = optax.tree.norm(GRADIENT)  # 1.5
    assert float(norm) == pytest.approx(1.5)
    update = _updates(1, warmup_updates=0, clip_norm=clip_norm, eps=1.0)[0][
      "embed_tokens"
    ]["embedding"]
    clipped = GRADIENT["embed_tokens"]["embedding"] * factor / norm
    # Adam's first step
    expected = -SETTINGS.und_learning_rate * clipped / (jnp.abs(clipped) + 1)
    np.testing.assert_allclose(update, expected, rtol=1e-4)

  def test_decays_weights_as_adamw_does(self):
    (update,) = _updates(1, warmup_updates=0, weight_decay=0.1)
    expected = -SETTINGS.und_learning_rate * (np.array([1, -1, 1]) + 0.1)
    np.testing.assert_allclose(
      update["layers"]["und"]["q"], expected, rtol=1e-4
    )


class TestUpdatesDone:
  @pytest.mark.parametrize(
    "changes", [{}, {"warmup_updates": 0}, {"freeze_und": True}]
  )
  def test_counts(self, changes):
    optimizer = train_state.make_optimizer(
      dataclasses.replace(SETTINGS, **changes)
    )
    policy = POLICY
    gradient = GRADIENT
    if changes.get("freeze_und"):
      _, policy = parameters.split_experts(POLICY)
      _, gradient = parameters.split_experts(GRADIENT)
    opt_state = optimizer.init(policy)
    for number in range(3):
      assert train_state.updates_done(opt_state) == number
      _, opt_state = optimizer.update(gradient, opt_state, policy)


class TestExpertLabels:
  def test_names_every_parameter_of_the_model(self):
    policy = goldens_lib.weights()["policy"]
    labels = train_state.expert_labels(policy)
    assert set(jax.tree.leaves(labels["layers"]["gen"])) == {"gen"}
    assert set(jax.tree.leaves(labels["layers"]["und"])) == {"und"}
    whole = {
      name: set(jax.tree.leaves(tree))
      for name, tree in labels.items()
      if name not in ("layers", "norm")
    }
    und, gen = {"und"}, {"gen"}
    assert whole == {
      "embed_tokens": und,
      "lm_head": und,
      "connector": und,
      "vae2llm": gen,
      "llm2vae": gen,
      "time_embedder": gen,
    }
    assert labels["norm"] == {"und": {"scale": "und"}, "gen": {"scale": "gen"}}

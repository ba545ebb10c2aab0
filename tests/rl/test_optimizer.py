"""Tests of the optimizer and of what belongs to which expert."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

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

  def test_freezes_what_goes_with_und(self):
    last = _updates(3, freeze_und=True)[-1]
    assert not np.any(last["embed_tokens"]["embedding"]) and not np.any(
      last["layers"]["und"]["q"]
    )
    assert np.all(last["layers"]["gen"]["q"]) and np.all(
      last["llm2vae"]["kernel"]
    )

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
    opt_state = optimizer.init(POLICY)
    for number in range(3):
      assert train_state.updates_done(opt_state) == number
      _, opt_state = optimizer.update(GRADIENT, opt_state, POLICY)


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

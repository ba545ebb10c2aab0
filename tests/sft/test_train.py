"""Tests of supervised training: the losses in closed form, batches over devices, learning."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from r3jax.agent import actors
from r3jax.checkpoint import bagel_files
from r3jax.checkpoint import tokenizer_files
from r3jax.model import image_encoders
from r3jax.model import network
from r3jax.model import siglip
from r3jax.sft import fitting
from r3jax.sft import joint
from r3jax.sft import small_bagel
from r3jax.sft import towers
from r3jax.worlds.shapes import batches
from r3jax.worlds.shapes import prompts
from r3jax.worlds.shapes import scenes
from tests import tiny

SIZES = small_bagel.sizes(ml_collections.ConfigDict(tiny.SIZES))


class TestVisionLoss:
  @staticmethod
  def _value(smudged: bool, head: np.ndarray) -> float:
    tower = siglip.VisionTransformer(SIZES.vision)
    patches = jnp.zeros((1, 1, 3 * scenes.CELL**2))
    params = tower.init(jax.random.key(0), patches, jnp.zeros(1, jnp.int32))[
      "params"
    ]
    scene = scenes.place(
      [(0, 0, 0), (1, 1, 4), (2, 2, 8)], np.random.default_rng(0)
    )
    if smudged:
      scene = scenes.smudge(scene, [0, 4, 8], np.random.default_rng(0))
    batch = jax.tree.map(lambda x: x[None], scene)
    value, _ = towers.vision_loss(tower, {"tower": params, "head": head}, batch)
    return float(value)

  def test_blind_head_pays_for_every_choice(self):
    head = np.zeros((SIZES.vision.hidden_size, 24), np.float32)
    assert self._value(False, head) == pytest.approx(
      np.log(3) + 2 * np.log(6) + np.log(9), abs=1e-5
    )

  def test_smudges_have_neither_shape_nor_colour(self):
    head = np.zeros((SIZES.vision.hidden_size, 24), np.float32)
    assert self._value(True, head) == pytest.approx(
      np.log(3) + np.log(9), abs=1e-5
    )


class TestFit:
  def test_batch_over_all_devices_gives_the_mean_of_all_rows(self):
    rows = np.arange(16, dtype=np.float32)
    steps = []

    def loss(x, batch, key):
      return (
        jnp.mean((x - batch) ** 2),
        {"loss": jnp.mean((x - batch) ** 2)},
      )

    def watch(step, state, metrics):
      steps.append((step, float(metrics["loss"])))
      return False

    optimizer = optax.sgd(0.5)
    start = fitting.begin(jnp.float32(3.5), optimizer)
    state = fitting.fit(loss, start, optimizer, iter([rows, rows]), 0, watch)
    assert float(state.params) == pytest.approx(7.5)
    assert steps == [
      (1, pytest.approx(np.mean((rows - 3.5) ** 2))),
      (2, pytest.approx(np.var(rows))),
    ]


class TestJointTraining:
  def test_every_part_falls_and_every_parameter_learns(self, tiny_model):
    weights = bagel_files.load(tiny_model, SIZES)
    policy = weights.pop("policy")
    tokenizer = tokenizer_files.load(tiny_model)
    modules = actors.Modules(
      network.Bagel(SIZES),
      image_encoders.Towers(SIZES, (scenes.CANVAS, scenes.CANVAS)),
    )
    settings = small_bagel.settings(tokenizer, modules.towers, points=2)
    training = joint.JointTraining(
      modules, settings, weights, copies=2, flow_weight=1.0, shift=3.0
    )
    by_tag, mix = (
      prompts.by_tag(prompts.train_records()),
      batches.Mix(0.5, 0.3, 0.25, 0.25),
    )
    encoder = batches.Encoder(
      by_tag, tokenizer, settings.capacities, mix, seed=0
    )
    (batch,) = batches.iterate(encoder, batch_size=8, num_steps=1)

    def same_noise(params, rows, key):
      return training.loss(params, rows, jax.random.key(0))

    rows = []

    def watch(step, state, metrics):
      rows.append({name: float(x) for name, x in metrics.items()})
      return False

    optimizer = optax.adam(1e-3)
    start = fitting.begin(policy, optimizer)
    trained = fitting.fit(
      same_noise, start, optimizer, iter([batch] * 6), 0, watch
    ).params
    for name in ("thought", "answer", "draft", "edit"):
      assert rows[-1][name] < rows[0][name], name
    changed = jax.tree.map(
      lambda new, old: bool(np.any(np.asarray(new) != old)), trained, policy
    )
    assert all(jax.tree.leaves(changed)), changed

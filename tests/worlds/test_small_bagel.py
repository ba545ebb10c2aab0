"""The small BAGEL that comes with the package: what its images are worth to the verifier."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from configs import r3_geneval
from r3jax import experiment as experiment_lib
from r3jax.parallel import mesh as mesh_lib
from r3jax.rewards import shapes as verifier
from r3jax.rl import rollout as rollout_lib
from r3jax.worlds import batches
from r3jax.worlds import shapes
from tests.rewards import numpy_verifier


@functools.cache
def _experiment() -> experiment_lib.Experiment:
  config = r3_geneval.get_config("shapes")
  with config.unlocked():
    config.eval.prompts, config.eval.points = 100, 12
  experiment = experiment_lib.build(config)
  return dataclasses.replace(
      experiment, settings=experiment_lib.evaluation_settings(config, experiment.settings)
  )


@functools.cache
def _weights():
  return _experiment().load(mesh_lib.make_mesh_of(jax.devices()[:1], 1, 1, 1))


def _drafts(number: int) -> np.ndarray:
  experiment = _experiment()
  policy, towers = _weights()
  actor = rollout_lib.Actor(experiment.modules, policy, towers, experiment.settings)
  prompts = experiment.encode(experiment.heldout)
  keys = jax.random.split(jax.random.key(0), (2, number))
  draft = jax.jit(lambda prompts, keys: rollout_lib.reason(actor, prompts, rollout_lib.Keys(*keys)).images)
  rows = np.arange(number) % prompts.index.shape[0]
  return np.asarray(draft(jax.tree.map(lambda x: x[rows], prompts), keys))


class TestAutoencoder:

  def test_scenes_are_read_right_after_a_round_trip(self):
    _, towers = _weights()
    eyes = _experiment().modules.towers

    @jax.jit
    def right(scene):
      images = shapes.render(scene)
      before, after = (verifier.detect(x) for x in (images, eyes.decode(towers, eyes.encode(towers, images))))
      return jnp.all((before.shape == after.shape) & (before.color == after.color), axis=-1)

    scenes = [batches.dense_scene(i, seed=9) for i in range(600)]
    stacked = [jax.tree.map(lambda *x: np.stack(x), *scenes[i : i + 100]) for i in range(0, 600, 100)]
    assert np.mean([right(scene) for scene in stacked]) >= 0.99


class TestDrafts:

  def test_verifiers_agree_on_200_generated_images(self):
    images = _drafts(200)
    found = jax.tree.map(np.asarray, verifier.detect(images))
    agree = []
    for i, image in enumerate(images):
      ours = {
          (shapes.SHAPES[s], shapes.COLORS[c], cell)
          for cell, (s, c) in enumerate(zip(found.shape[i], found.color[i])) if s >= 0
      }
      theirs = {(one["class"], one["color"], one["cell"]) for one in numpy_verifier.read(image)}
      agree.append(ours == theirs)
    assert np.mean(agree) >= 0.95

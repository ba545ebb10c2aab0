"""The small BAGEL that comes with the package, as the verifier sees it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from configs import r3_geneval
from r3jax import experiment as experiment_lib
from r3jax.parallel import mesh as mesh_lib
from r3jax.rewards import shapes as verifier
from r3jax.worlds import batches
from r3jax.worlds import shapes


@functools.cache
def _experiment() -> experiment_lib.Experiment:
  return experiment_lib.build(r3_geneval.get_config("shapes"))


@functools.cache
def _weights():
  return _experiment().load(mesh_lib.make_mesh_of(jax.devices()[:1], 1, 1, 1))


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

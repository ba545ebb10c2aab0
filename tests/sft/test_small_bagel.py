"""The small BAGEL that comes with the package, as the verifier sees it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from configs import r3_geneval
from r3jax.evaluation import chains
from r3jax.parallel import meshes
from r3jax.run import prompt_selection
from r3jax.run import setup
from r3jax.run import stage_settings
from r3jax.worlds.shapes import batches
from r3jax.worlds.shapes import prompts as prompts_lib
from r3jax.worlds.shapes import scenes as scenes_lib
from r3jax.worlds.shapes import verifier
from tests import tiny
from tests.worlds import numpy_verifier


@functools.cache
def _experiment() -> setup.Experiment:
  return setup.build(r3_geneval.get_config("shapes"))


@functools.cache
def _mesh() -> jax.sharding.Mesh:
  return meshes.make_mesh_on(jax.devices()[:1], 1, 1, 1)


@functools.cache
def _weights():
  return _experiment().load(_mesh())


def _generate(number: int) -> chains.Round:
  """Returns drafts of held-out prompts, as many of every tag."""
  experiment, config = _experiment(), r3_geneval.get_config("shapes")
  with config.unlocked():
    config.eval.points = 12
  settings = stage_settings.for_evaluation(config, experiment.rollout)
  mesh = _mesh()
  reward, parse = experiment.reward.on(mesh), experiment.parse(mesh)
  sampler = chains.Sampler(
    experiment.modules,
    settings,
    reward,
    parse,
    mesh,
    rounds=1,
    batch_size=number // 2,
    seed=3,
  )
  prompts = experiment.encode(
    prompt_selection.evenly(prompts_lib.heldout_records(), number, 3)[:number]
  )
  with jax.set_mesh(mesh):
    (drafts,) = tiny.draw(sampler, *_weights(), prompts, 1)
  return drafts


class TestVerifierOnGeneratedImages:
  def test_agrees_with_plain_numpy(self):
    images = _generate(200).kept.images
    assert len(np.unique(images, axis=0)) == 200
    objects = jax.device_get(jax.jit(verifier.detect)(images))
    differing, margins = set(), []
    for i, image in enumerate(images):
      seen = {
        o["cell"]: (o["class"], o["color"]) for o in numpy_verifier.read(image)
      }
      for cell in range(9):
        shape, color = objects.shape[i, cell], objects.color[i, cell]
        found = (
          (scenes_lib.SHAPES[shape], scenes_lib.COLORS[color])
          if shape >= 0
          else None
        )
        if seen.get(cell) != found:
          differing.add(i)
          margins.append(
            np.min(abs(objects.error[i, cell] / verifier.THRESHOLDS - 1))
          )
    assert len(differing) <= 6  # 97 % of the images in full,
    # and what differs lies at the threshold
    assert max(margins, default=0) < 0.1


class TestAutoencoder:
  def test_scenes_are_read_right_after_a_round_trip(self):
    _, towers = _weights()
    eyes = _experiment().modules.towers

    @jax.jit
    def right(scene):
      images = scenes_lib.render(scene)
      before, after = (
        verifier.detect(x)
        for x in (images, eyes.decode(towers, eyes.encode(towers, images))[0])
      )
      return jnp.all(
        (before.shape == after.shape) & (before.color == after.color), axis=-1
      )

    scenes = [batches.dense_scene(i, seed=9) for i in range(600)]
    # smudges are no objects
    scenes = [scene.replace(ghost_shape=np.full(9, -1)) for scene in scenes]
    stacked = [
      jax.tree.map(lambda *x: np.stack(x), *scenes[i : i + 100])
      for i in range(0, 600, 100)
    ]
    assert np.mean([right(scene) for scene in stacked]) >= 0.99

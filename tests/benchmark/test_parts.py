"""Tests that the parts of a benchmark compute what the training step computes."""

import jax
import numpy as np
import pytest

from configs import benchmark
from r3jax.agent import experience
from r3jax.benchmark import measure
from r3jax.benchmark import parts
from r3jax.benchmark import subject
from r3jax.benchmark import workload
from r3jax.model import network
from r3jax.rl import mapped
from r3jax.rl import placement

ROWS = jax.sharding.PartitionSpec(placement.AXIS)
TINY = {
  "sizes.hidden_size": 32,
  "sizes.intermediate_size": 64,
  "sizes.num_layers": 2,
  "sizes.num_heads": 4,
  "sizes.num_kv_heads": 2,
  "sizes.vocab_size": 64,
  "sizes.vision_hidden_size": 16,
  "sizes.vision_intermediate_size": 32,
  "sizes.vision_num_layers": 1,
  "sizes.vision_num_heads": 2,
  "sizes.autoencoder_multipliers": (1, 1, 1, 1),
  "image.height": 48,
  "image.width": 48,
  "group_size": 8,
  "sequence.thought_tokens": 6,
  "sequence.answer_tokens": 8,
  "sequence.instruction_tokens": 7,
  "reason.points": 4,
  "reason.sde_index_max": 3,
  "refine.points": 4,
  "mesh.data": -1,
  "benchmark.repeats": 1,
}


def tiny():
  """Returns a session of tiny sizes on all devices, and the policy before training."""
  config = benchmark.get_config().copy_and_resolve_references()
  config.update_from_flattened_dict(TINY)
  return subject.build(config.lock())


class TestRowSpecs:
  def test_rows_of_caches_are_behind_the_layers(self):
    cache = network.Cache(np.zeros((2, 8)), np.zeros((2, 8)), ("prompt",))
    text = experience.Text(np.zeros(8), np.zeros(8), np.zeros(8))
    specs = parts.row_specs((cache, text))
    behind = jax.sharding.PartitionSpec(None, placement.AXIS)
    assert specs[0] == network.Cache(behind, behind, ("prompt",))
    assert specs[1] == experience.Text(ROWS, ROWS, ROWS)


class TestSizes:
  @pytest.mark.parametrize(
    "variant, latent_grid, vit_grid",
    [("peer", (16, 16), (18, 18)), ("1b", (32, 32), (36, 36))],
  )
  def test_images_keep_their_size(self, variant, latent_grid, vit_grid):
    config = benchmark.get_config(variant)
    sizes = subject.model_sizes(config)
    towers = subject.image_encoders.Towers(
      sizes, (config.image.height, config.image.width)
    )
    assert towers.latent_grid == latent_grid
    assert towers.vit_grid == vit_grid


@pytest.mark.slow
class TestMeasureParts:
  def test_parts_compute_what_the_step_computes(self):
    session, policy = tiny()
    results = {}
    measurements = []

    class Keeping(parts.Recorder):
      def run(self, name, part, *arguments, **options):
        result = super().run(name, part, *arguments, **options)
        results[name] = result
        return result

    with jax.set_mesh(session.mesh):
      state = session.init(policy)
      programs = mapped.split(session.stages, session.mesh)
      timer = measure.Timer(0, 1)
      recorder = Keeping(session.mesh, timer, parts.NAMES, measurements.append)
      parts.measure_parts(session, state, recorder)
      _, _, samples = mapped.run_timed(
        programs, state, session.frozen, session.prompts, np.uint32(0)
      )

    drafts = samples.drafts.rollout
    _, thought = results["think"]
    np.testing.assert_array_equal(thought.text.ids, drafts.text.ids)
    # Texts never end early.
    assert np.all(drafts.text.lengths == 7)
    assert np.all(samples.edits.text.lengths == 9)
    np.testing.assert_allclose(
      results["draft_flow"].latent, drafts.trajectory.latent, atol=1e-4
    )
    images, _ = results["image_decode"]
    difference = images.astype(int) - np.asarray(drafts.images, int)
    assert np.abs(difference).max() <= 1
    learned, metrics = results["reason_update"]
    assert metrics["skipped"] == 0
    assert np.isfinite(metrics["gradient_norm"])
    assert [m.name for m in measurements] == list(parts.NAMES)
    assert set(workload.of_programs(session)) >= set(parts.NAMES)

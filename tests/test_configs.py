"""Tests of the config files' variants."""

import math

import pytest

from configs import r3_geneval
from configs import r3_geneval_plus
from configs import r3_ocr
from configs import r3_tiif
from configs import slices
from r3jax.data import sets
from r3jax.rewards.serving import ocr
from r3jax.rl import placement


def _devices(topology: str) -> int:
  """Returns how many devices JAX sees: a chip of tpu7x is two."""
  chip, _, shape = topology.partition(":")
  return math.prod(int(n) for n in shape.split("x")) * (
    2 if chip == "tpu7x" else 1
  )


DEVICES = {
  name: _devices(layout.topology) for name, layout in slices.SLICES.items()
}


class TestSmoke:
  def test_is_the_embedded_world_with_less_work(self):
    smoke = r3_geneval.get_config("smoke")
    shapes = r3_geneval.get_config("shapes")
    assert smoke.world == shapes.world == "shapes"
    assert smoke.total_steps == 2
    assert smoke.checkpoint.every == 2
    assert smoke.sequence == shapes.sequence
    placement.check(smoke.groups_per_step, smoke.group_size, 1, 1)


class TestSlices:
  @pytest.mark.parametrize("name", slices.SLICES)
  @pytest.mark.parametrize(
    "file", [r3_geneval, r3_geneval_plus, r3_tiif, r3_ocr]
  )
  def test_mesh_is_that_of_the_slice_and_the_samples_split(self, file, name):
    config = file.get_config(name)
    mesh = config.mesh
    assert mesh.data * mesh.fsdp * mesh.tensor == DEVICES[name]
    placement.check(
      config.groups_per_step,
      config.group_size,
      mesh.data,
      config.step.micro_batches,
    )
    rows = (
      config.groups_per_step
      * config.group_size
      // mesh.data
      // config.step.micro_batches
    )
    assert rows % mesh.fsdp == 0  # every chip has rows of its own in an update
    assert 28 % mesh.tensor == 4 % mesh.tensor == 0  # heads

  def test_names_tell_the_size(self):
    cores = {
      name: number * (2 if "v5p" in name else 1)
      for name, number in DEVICES.items()
    }
    assert cores == {
      name: int(name.rpartition("-")[2]) for name in slices.SLICES
    }

  def test_unknown_variant_lists_the_known(self):
    with pytest.raises(
      ValueError,
      match="must be one of .*'bagel', 'shapes', 'smoke', 'v5p-128'.*; got 'v9'",
    ):
      r3_geneval.get_config("v9")

  def test_adapters_alone_are_trained_on_the_smallest(self):
    assert (
      r3_geneval.get_config("lora-v5e-16").model.lora.rank
      > 0
      == r3_geneval.get_config("v5p-128").model.lora.rank
    )


class TestOcr:
  def test_prompts_need_no_file_and_fit_into_their_slots(self):
    config = r3_ocr.get_config()
    changes = {"generated": 400}
    loaded = sets.load(sets.Settings(**config.data.to_dict() | changes))
    assert len(loaded.heldout) == 200
    assert 200 < len(loaded.train) < 400
    for prompt in loaded.train + loaded.heldout:
      ocr.check_prompt(prompt)
      # At most: a token of a byte-level vocabulary holds at least a byte.
      num_tokens = len(prompt.text.encode()) + 2  # begin and end
      assert num_tokens <= config.sequence.prompt_tokens

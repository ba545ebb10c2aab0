"""Tests of checkpoint/finite_weights.py: nothing starts with weights that are not finite."""

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r3jax import inference
from r3jax.checkpoint import bagel_files
from r3jax.checkpoint import finite_weights
from r3jax.parallel import meshes
from r3jax.run import evaluation_job
from r3jax.run import sessions
from r3jax.run import setup
from tests import tiny


class TestNumNonfinite:
  @pytest.mark.parametrize("axes", [(), ("a",), ("a", "b"), (None, "b")])
  def test_counts_every_number_once_however_it_is_sharded(self, axes):
    devices = np.array(jax.devices()[:8]).reshape(2, 4)
    mesh = jax.sharding.Mesh(devices, ("a", "b"))
    kernel = np.zeros((8, 8), np.float32)
    kernel[[0, 3, 7], [0, 5, 7]] = [np.nan, np.inf, -np.inf]
    sharding = jax.sharding.NamedSharding(
      mesh, jax.sharding.PartitionSpec(*axes)
    )
    params = {
      "head": {"kernel": jax.device_put(kernel, sharding)},
      "norm": {"scale": jnp.ones(3, jnp.bfloat16)},
      "step": jnp.int32(7),
    }
    with jax.set_mesh(mesh):
      assert finite_weights.num_nonfinite(params) == {"head/kernel": 3}
    assert finite_weights.num_nonfinite(params) == {"head/kernel": 3}

  def test_the_largest_numbers_of_a_dtype_are_finite(self):
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
      params = {"x": jnp.array([jnp.finfo(dtype).max, 0, -0.0], dtype)}
      finite_weights.check(params, "here")

  def test_message_names_leaves_in_one_line(self):
    bad = jnp.array([np.nan, 1.0])
    params = {"layers": {f"q{i}": bad for i in range(7)}}
    with pytest.raises(ValueError) as error:
      finite_weights.check(params, "FOLDER")
    message = str(error.value)
    assert "those of FOLDER are not in layers/q0 (1), layers/q1 (1)" in message
    assert "and 2 more leaves" in message and "\n" not in message


ON_EIGHT = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}


def _write_with_nan(folder, tree: str) -> str:
  """Writes the tiny model with one NaN in the last leaf of a tree; returns the leaf's path."""
  tiny.write_model(folder)
  sizes = setup.build(tiny.make_config(folder)).pretrained.sizes
  weights = tiny.random_weights(sizes)
  leaves = flax.traverse_util.flatten_dict(weights[tree])
  path = sorted(leaves)[-1]
  leaf = np.array(leaves[path])
  leaf[(0,) * leaf.ndim] = np.nan
  leaves[path] = leaf
  weights[tree] = flax.traverse_util.unflatten_dict(leaves)
  bagel_files.save(weights, sizes, folder)
  return "/".join((tree, *path))


class TestModelFolder:
  """One NaN in a file made a policy NaN, which was trained and saved with exit code 0."""

  def test_is_refused_by_name_before_anything_is_written(self, tmp_path):
    folder = tmp_path / "model"
    name = _write_with_nan(folder, "policy")
    config = tiny.make_config(folder, ON_EIGHT)
    workdir = tmp_path / "workdir"
    starts = (
      lambda: sessions.prepare(config, workdir),
      lambda: evaluation_job.prepare(config, str(workdir)),
      lambda: inference.load(config),
    )
    for start in starts:
      with pytest.raises(ValueError, match="weights must be finite") as error:
        start()
      assert f"{name} (1)" in str(error.value)
    assert not workdir.exists()

  @pytest.mark.parametrize("tree", ["vision", "autoencoder"])
  def test_is_refused_in_towers(self, tmp_path, tree):
    folder = tmp_path / "model"
    name = _write_with_nan(folder, tree)
    experiment = setup.build(tiny.make_config(folder))
    mesh = meshes.make_mesh_on(jax.devices()[:1], 1, 1, 1)
    with pytest.raises(ValueError, match=f"{name} "):
      experiment.load(mesh)


def test_devices_count_as_the_host_does():
  """The program of accelerators against the loop that CPUs take."""
  numbers = np.zeros((3, 5), np.float32)
  numbers[1, 2:4] = np.nan
  numbers[2, 0] = -np.inf
  arrays = [jnp.asarray(numbers), jnp.asarray(numbers, jnp.bfloat16)]
  counts = [int(count) for count in finite_weights._counts(arrays)]
  assert counts == [finite_weights._count_on_host(x) for x in arrays] == [3, 3]

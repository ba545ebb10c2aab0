"""Tests of loading a model of BAGEL's full key set, split over files, onto meshes of devices."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import flax.traverse_util
import jax
import numpy as np
import pytest

from r3jax.checkpoint import bagel_files
from r3jax.checkpoint import bagel_names
from r3jax.checkpoint import pretrained
from r3jax.checkpoint import safetensors_files
from r3jax.model import network
from r3jax.parallel import meshes
from tests.checkpoint import sharded_model

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  folder = tmp_path_factory.mktemp("narrow")
  return folder, sharded_model.write(folder, sharded_model.narrow_bagel())


@pytest.fixture(scope="module")
def loaded(model):
  found = pretrained.find(str(model[0]))
  mesh = meshes.make_mesh_on(jax.devices(), 1, 4, 2)
  policy, frozen = found.load(network.Bagel(found.sizes), mesh)
  return {"policy": policy, **frozen}


def _free_port() -> int:
  with socket.socket() as found:
    found.bind(("localhost", 0))
    return found.getsockname()[1]


def _load_in_processes(folder: pathlib.Path, processes: int) -> list[dict]:
  """Loads in fresh processes with 8 devices together; returns what each prints."""
  flags = f"--xla_force_host_platform_device_count={8 // processes}"
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
  port, command = (
    _free_port(),
    [sys.executable, "-m", "tests.checkpoint.load_sharded", str(folder)],
  )
  started = [
    subprocess.Popen(
      [*command, str(i), str(processes), str(port)],
      cwd=ROOT,
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(processes)
  ]
  outputs = [process.communicate(timeout=300) for process in started]
  assert [process.returncode for process in started] == [0] * processes, outputs
  return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


class TestSharded:
  def test_is_split_over_the_devices_and_equals_the_files(self, model, loaded):
    folder, tensors = model
    leaves = flax.traverse_util.flatten_dict(loaded, sep="/")
    for tensor in bagel_names.table(sharded_model.narrow_bagel()):
      leaf = leaves[tensor.path]
      seen = np.asarray(leaf if tensor.layer is None else leaf[tensor.layer])
      np.testing.assert_array_equal(
        seen, tensor.to_tree(tensors[tensor.name]).astype(np.float32)
      )
    gate = leaves["policy/layers/gen/gate/kernel"]
    assert gate.shape == (28, 112, 2816)
    assert {shard.data.shape for shard in gate.addressable_shards} == {
      (28, 28, 1408)
    }
    assert {
      s.data.shape for s in leaves["vision/layers/q/kernel"].addressable_shards
    } == {(26, 64, 16, 4)}

  def test_bf16_round_trip_is_bit_exact(self, model, loaded, tmp_path):
    folder, tensors = model
    bagel_files.save(
      loaded, sharded_model.narrow_bagel(), tmp_path, sharded_model.BF16
    )
    written = {}
    for name in ("ema.safetensors", "ae.safetensors"):
      written |= safetensors_files.read_header(tmp_path / name)
    for name, tensor in tensors.items():
      assert (
        safetensors_files.read(written[name]).tobytes() == tensor.tobytes()
      ), name

  @pytest.mark.parametrize("processes", [1, 2])
  def test_a_process_holds_its_shards_and_little_more(
    self, model, loaded, processes
  ):
    folder, tensors = model
    largest = max(tensor.nbytes for tensor in tensors.values())
    sums = {}
    for found in _load_in_processes(folder, processes):
      assert found["above_start"] <= found["shards"] + 1.5 * largest, (
        found["above_start"] / found["shards"]
      )
      for path, parts in found["sums"].items():
        sums.setdefault(path, []).extend(parts)
    leaves = flax.traverse_util.flatten_dict(loaded, sep="/")
    assert {path: sorted(parts) for path, parts in sums.items()} == {
      path: sorted(_sum(shard.data) for shard in leaf.addressable_shards)
      for path, leaf in leaves.items()
    }

  def test_replicas_may_share_memory_and_be_donated(self, model):
    """CPU replicas take over the same memory; an update must not write into it."""
    found, mesh = (
      pretrained.find(str(model[0])),
      meshes.make_mesh_on(jax.devices()[:2], 2, 1, 1),
    )
    policy, _ = found.load(network.Bagel(found.sizes), mesh)
    shards = [
      np.asarray(shard.data)
      for shard in policy["llm2vae"]["kernel"].addressable_shards
    ]
    before = shards[0].copy()
    after = jax.jit(
      lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0
    )(policy)
    for shard, updated in zip(
      shards, after["llm2vae"]["kernel"].addressable_shards, strict=True
    ):
      np.testing.assert_array_equal(shard, before)
      np.testing.assert_array_equal(np.asarray(updated.data), before + 1)

  @pytest.mark.parametrize("fsdp, tensor", [(8, 1), (4, 2)])
  def test_every_byte_is_read_once(self, model, monkeypatch, fsdp, tensor):
    folder, tensors = model
    found, read, bytes_read = (
      pretrained.find(str(folder)),
      safetensors_files.read,
      [],
    )

    def counted(entry, rows):
      bytes_read.append((array := read(entry, rows)).nbytes)
      return array

    monkeypatch.setattr(safetensors_files, "read", counted)
    found.load(
      network.Bagel(found.sizes),
      meshes.make_mesh_on(jax.devices(), 1, fsdp, tensor),
    )
    assert sum(bytes_read) == sum(tensor.nbytes for tensor in tensors.values())


def _sum(array: jax.Array) -> float:
  return float(np.sum(np.asarray(array, np.float64)))

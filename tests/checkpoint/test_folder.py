"""Tests of finding and loading a model in its three kinds of folders."""

import collections
import json
import math
import shutil
import subprocess
import sys

from etils import epath
import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from r3jax.checkpoint import bagel_files
from r3jax.checkpoint import orbax_weights
from r3jax.checkpoint import pretrained
from r3jax.checkpoint import training
from r3jax.data import pipeline
from r3jax.model import architecture
from r3jax.model import autoencoder
from r3jax.model import network
from r3jax.model import parameters
from r3jax.model import siglip
from r3jax.parallel import meshes
from r3jax.rl import train_state
from tests import stores
from tests import tiny

# What docs/checkpoints.md shows; imports no r3jax.
PLAIN_ORBAX = """
import json, sys
import jax, orbax.checkpoint as ocp

weights = ocp.StandardCheckpointer().restore(sys.argv[1])
kernel = weights["policy"]["lm_head"]["kernel"]
assert not any(name.startswith("r3jax") for name in sys.modules)
head = [*kernel.shape, str(kernel.dtype), float(kernel.sum())]
print(json.dumps({"leaves": len(jax.tree.leaves(weights)), "head": head}))
"""


@pytest.fixture(scope="module")
def mesh():
  return meshes.make_mesh_on(jax.devices(), 2, 2, 2)


@pytest.fixture(scope="module")
def source(tiny_model):
  return pretrained.find(str(tiny_model))


@pytest.fixture(scope="module")
def weights(source, mesh):
  return source.weights(
    pretrained.shardings(network.Bagel(source.sizes), mesh), None
  )


@pytest.fixture(scope="module")
def converted(source, weights, tmp_path_factory):
  folder = tmp_path_factory.mktemp("orbax") / "model"
  pretrained.save(weights, source, folder, "orbax")
  return folder


def _same(found, expected):
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)),
    found,
    expected,
  )


class TestOrbaxFolder:
  def test_holds_the_same_model_with_its_shardings(
    self, converted, source, weights, mesh
  ):
    found = pretrained.find(str(converted))
    assert found.sizes == source.sizes
    assert found.tokenizer.vocabulary == source.tokenizer.vocabulary
    policy, frozen = found.load(network.Bagel(found.sizes), mesh)
    _same({"policy": policy, **frozen}, weights)
    expected = parameters.shardings(network.Bagel(found.sizes), mesh)
    assert jax.tree.map(lambda leaf: leaf.sharding, policy) == expected

  def test_goes_back_to_bagel_bit_by_bit(self, converted, source, tmp_path):
    found = pretrained.find(str(converted))
    one = meshes.make_mesh_on(jax.devices()[:1], 1, 1, 1)
    back = found.weights(
      pretrained.shardings(network.Bagel(found.sizes), one), None
    )
    pretrained.save(back, found, tmp_path / "back", "bagel")
    for name in (
      "ema.safetensors",
      "ae.safetensors",
      "llm_config.json",
      "tokenizer.json",
    ):
      assert (tmp_path / "back" / name).read_bytes() == (
        source.folder / name
      ).read_bytes(), name

  def test_is_restored_by_a_script_without_r3jax(
    self, converted, weights, tmp_path
  ):
    (tmp_path / "plain.py").write_text(PLAIN_ORBAX)
    command = [
      sys.executable,
      str(tmp_path / "plain.py"),
      str(converted / "weights"),
    ]
    found = subprocess.run(
      command, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0, found.stderr
    seen, head = (
      json.loads(found.stdout),
      np.asarray(weights["policy"]["lm_head"]["kernel"]),
    )
    assert seen["leaves"] == len(jax.tree.leaves(weights))
    assert seen["head"][:3] == [*head.shape, str(head.dtype)]
    assert seen["head"][3] == pytest.approx(head.sum(), rel=1e-5)

  def test_lists_what_differs_from_the_sizes(self, converted, mesh, tmp_path):
    shutil.copytree(converted, tmp_path / "model")
    # With digests the changed file itself would be refused.
    (tmp_path / "model" / "digests.json").unlink()
    path = tmp_path / "model" / "llm_config.json"
    path.write_text(
      json.dumps(json.loads(path.read_text()) | {"intermediate_size": 40})
    )
    found = pretrained.find(str(tmp_path / "model"))
    # gate, up and down of two experts
    with pytest.raises(ValueError, match=r"6 problem\(s\)") as error:
      found.load(network.Bagel(found.sizes), mesh)
    assert (
      "mis-shaped leaf policy/layers/gen/gate/kernel: expected shape"
      in str(error.value)
    )

  @pytest.mark.parametrize("form", ["orbax", "bagel"])
  def test_no_model_is_overwritten(self, converted, source, weights, form):
    for folder, held in (
      (converted, "weights"),
      (source.folder, "ae.safetensors, ema.safetensors"),
    ):
      with pytest.raises(
        ValueError, match=f"never overwritten: .* which has {held}"
      ):
        pretrained.save(weights, source, folder, form)

  def test_a_form_must_be_known(self, source, weights, tmp_path):
    with pytest.raises(ValueError, match="'bagel' or 'orbax'; got 'torch'"):
      pretrained.save(weights, source, tmp_path / "new", "torch")


@pytest.fixture(scope="module")
def workdir(tiny_model, weights, tmp_path_factory):
  """A workdir as a run leaves it, whose policy is twice that of the model it started from."""
  folder, config = tmp_path_factory.mktemp("run"), tiny.make_config(tiny_model)
  (folder / "config.json").write_text(json.dumps(config.to_dict()))
  (folder / "checkpoints").mkdir()
  saved = training.Checkpoints(folder / "checkpoints", every=1, keep=1)
  policy = jax.tree.map(lambda x: 2 * x, weights["policy"])
  optimizer = train_state.make_optimizer(
    train_state.OptimizerSettings(**config.optimizer)
  )
  saved.save(
    7,
    train_state.TrainState(policy, optimizer.init(policy), jnp.int32(0)),
    pipeline.prompt_iterator(12, 2, 0),
  )
  saved.close()
  return folder


class TestWorkdir:
  def test_gives_the_trained_policy_and_the_other_weights_of_its_start(
    self, workdir, weights, mesh
  ):
    found = pretrained.find(str(workdir))
    policy, frozen = found.load(network.Bagel(found.sizes), mesh)
    _same(policy, jax.tree.map(lambda x: 2 * x, weights["policy"]))
    _same(frozen, {name: weights[name] for name in ("vision", "autoencoder")})

  def test_damaged_newer_checkpoint_is_passed_over(self, workdir, tmp_path):
    folder = shutil.copytree(workdir, tmp_path / "run")
    shutil.copytree(folder / "checkpoints" / "7", folder / "checkpoints" / "9")
    found = pretrained.find(str(folder))
    assert found.trained == epath.Path(folder) / "checkpoints" / "7" / "state"
    assert pretrained.step_of_run(epath.Path(folder)) == 7
    # Nothing is renamed by a reader.
    assert (folder / "checkpoints" / "9").is_dir()

  def test_is_exported_for_pytorch(self, workdir, weights, tmp_path):
    found = pretrained.find(str(workdir))
    one = meshes.make_mesh_on(jax.devices()[:1], 1, 1, 1)
    stored = found.weights(
      pretrained.shardings(network.Bagel(found.sizes), one), None
    )
    pretrained.save(stored, found, tmp_path / "out", "bagel")
    written = safetensors.numpy.load_file(tmp_path / "out" / "ema.safetensors")
    head = np.asarray(weights["policy"]["lm_head"]["kernel"])
    np.testing.assert_array_equal(
      written["language_model.lm_head.weight"], 2 * head.T
    )
    assert (tmp_path / "out" / "ae.safetensors").read_bytes() == (
      found.folder / "ae.safetensors"
    ).read_bytes()

  @pytest.mark.parametrize("content", ["{", "[]", '{"model": {}}'])
  def test_must_hold_the_config_of_a_run(self, workdir, tmp_path, content):
    shutil.copytree(workdir, tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(content)
    with pytest.raises(
      ValueError,
      match="config.json must be the config of a run, with model.folder",
    ):
      pretrained.find(str(tmp_path / "run"))

  def test_must_hold_a_checkpoint(self, workdir, tmp_path):
    shutil.copy(workdir / "config.json", tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="must hold a complete checkpoint"):
      pretrained.find(str(tmp_path))


class TestFingerprint:
  def test_tells_the_kinds_and_the_weights_apart(
    self, source, converted, weights, tmp_path
  ):
    shutil.copytree(source.folder, tmp_path / "copy")
    assert (
      pretrained.find(str(tmp_path / "copy")).fingerprint()
      == source.fingerprint()
    )
    changed = jax.tree.map(np.asarray, weights)
    changed["policy"]["lm_head"]["kernel"] = -changed["policy"]["lm_head"][
      "kernel"
    ]
    pretrained.save(changed, source, tmp_path / "changed", "bagel")
    prints = [
      pretrained.find(str(f)).fingerprint()
      for f in (source.folder, converted, tmp_path / "changed")
    ]
    assert len(set(prints)) == 3

  def test_files_that_are_not_read_do_not_count(self, source, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(source.folder, folder)
    for name in ("model.safetensors", "old.safetensors", "._ema.safetensors"):
      shutil.copy(folder / "ae.safetensors", folder / name)
    assert pretrained.find(str(folder)).fingerprint() == source.fingerprint()
    (folder / "ema.safetensors").unlink()
    assert pretrained.find(str(folder)).fingerprint() != source.fingerprint()


class TestShardings:
  def test_name_every_leaf_once(self, source, mesh):
    placed = pretrained.shardings(network.Bagel(source.sizes), mesh)
    policy = flax.traverse_util.flatten_dict(
      parameters.shardings(network.Bagel(source.sizes), mesh), sep="/"
    )
    assert set(placed) == set(bagel_files.leaf_shapes(source.sizes))
    assert {
      path: one for path, one in placed.items() if path.startswith("policy/")
    } == {f"policy/{path}": one for path, one in policy.items()}


class TestSevenBillion:
  def test_eval_shape_gives_the_released_counts_part_by_part(self):
    """docs/algorithm.md#model; the sin-cos tables of the release are no parameters here."""
    sizes = architecture.bagel_7b()
    boxed = jax.eval_shape(
      lambda: parameters.init(network.Bagel(sizes), jax.random.key(0))
    )
    towers = _abstract_towers(sizes)
    leaves = flax.traverse_util.flatten_dict(
      {"policy": nn.unbox(boxed), **towers}, sep="/"
    )
    assert {
      path: leaf.shape for path, leaf in leaves.items()
    } == bagel_files.leaf_shapes(sizes)
    counts = collections.Counter()
    for path, leaf in leaves.items():
      part = (
        path.split("/")[1] if path.startswith("policy/") else path.split("/")[0]
      )
      counts[
        {
          "layers": "language_model",
          "embed_tokens": "language_model",
          "lm_head": "language_model",
          "norm": "language_model",
        }.get(part, part)
      ] += math.prod(leaf.shape)
    assert counts == {
      "language_model": 14_141_252_608,
      "vision": 402_552_736,
      "connector": 16_980_992,
      "time_embedder": 13_769_728,
      "vae2llm": 232_960,
      "llm2vae": 229_440,
      "autoencoder": 83_819_683,
    }


def _abstract_towers(sizes: architecture.BagelConfig) -> dict:
  """Returns shapes of the parameters of ViT and autoencoder."""
  tower = siglip.VisionTransformer(sizes.vision)
  patches = jnp.zeros((1, 1, 3 * sizes.vision.patch_size**2))
  model = autoencoder.Autoencoder(
    sizes.autoencoder, latent_patch=sizes.latent_patch
  )
  pixels = jnp.zeros((1, sizes.pixels_per_token, sizes.pixels_per_token, 3))
  vision = jax.eval_shape(
    tower.init, jax.random.key(0), patches, jnp.zeros(1, int)
  )["params"]
  return nn.unbox(
    {
      "vision": vision,
      "autoencoder": jax.eval_shape(model.init, jax.random.key(0), pixels)[
        "params"
      ],
    }
  )


class TestBucket:
  def test_a_model_in_a_bucket_is_read_by_ranges(
    self, source, weights, mesh, bucket
  ):
    shutil.copytree(source.folder, bucket / "model")
    found = pretrained.find("gs://bucket/model")
    assert str(found.folder).startswith("gs://")
    policy, frozen = found.load(network.Bagel(found.sizes), mesh)
    _same({"policy": policy, **frozen}, weights)
    assert found.fingerprint() == source.fingerprint()


@pytest.fixture
def bucket(tmp_path, monkeypatch):
  """A folder that epath opens at gs://bucket."""
  stores.serve(stores.FolderStore("gs://bucket", str(tmp_path)), monkeypatch)
  return tmp_path


def test_orbax_weights_refuse_a_leaf_that_is_not_there(converted):
  wanted = {"policy": {"nothing": jax.ShapeDtypeStruct((2,), np.float32)}}
  with pytest.raises(
    ValueError, match=r"missing leaf policy/nothing: expected shape \(2,\)"
  ):
    orbax_weights.load(converted / "weights", wanted, None)


def test_orbax_weights_need_a_checkpoint(tmp_path):
  (tmp_path / "weights").mkdir()
  with pytest.raises(
    ValueError, match="must be at .*weights; its metadata is missing"
  ):
    orbax_weights.load(tmp_path / "weights", {}, None)


class TestMissingFolder:
  def test_is_named_with_the_nearest(self, tmp_path):
    (tmp_path / "first").mkdir()
    message = f"not found: {tmp_path}/firs; did you mean {tmp_path}/first[?]$"
    with pytest.raises(ValueError, match=message):
      pretrained.find(str(tmp_path / "firs"))

"""Tests of adapters in PEFT's format: `r3jax convert --format=peft`, and such a folder as a model.

With torch and peft installed, `python -m pytest -m torch tests/checkpoint/test_peft_files.py` also
compares what PEFT computes with them.
"""

import json
import shutil

import flax.linen as nn
import flax.traverse_util
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from r3jax.checkpoint import convert
from r3jax.checkpoint import peft_files
from r3jax.checkpoint import pretrained
from r3jax.model import low_rank
from r3jax.model import network
from r3jax.model import parameters
from r3jax.parallel import meshes
from tests import tiny

LORA = low_rank.LoRA(2, 6.0, ("q", "v", "down"), ("o", "gate"))
CONFIG = {
  "model.lora.rank": LORA.rank,
  "model.lora.alpha": LORA.alpha,
  "model.lora.und": LORA.und,
  "model.lora.gen": LORA.gen,
}
PREFIX = "base_model.model.language_model.model.layers."


def flat(tree):
  return flax.traverse_util.flatten_dict(jax.device_get(tree), sep="/")


@pytest.fixture(scope="module")
def adapters(tiny_model):
  """Random adapters, whose B is not zero."""
  model = network.Bagel(pretrained.find(str(tiny_model)).sizes, lora=LORA)
  shapes = low_rank.adapters(nn.unbox(parameters.boxed(model)))
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes
  )


@pytest.fixture(scope="module")
def workdir(tiny_model, adapters, tmp_path_factory):
  """The workdir of a run with these adapters."""
  folder = tmp_path_factory.mktemp("lora") / "run"
  return tiny.write_workdir(
    folder, tiny.make_config(tiny_model, CONFIG), adapters
  )


def export(source, out, dtype=None):
  def ignore(share):
    del share

  convert.convert(str(source), out, "peft", dtype, ignore, ignore)
  return out


@pytest.fixture(scope="module")
def exported(workdir, tmp_path_factory):
  """The folder of the run's adapters in PEFT's format."""
  return export(workdir, tmp_path_factory.mktemp("peft") / "adapter")


@pytest.fixture
def copy(exported, tmp_path):
  """A copy of it that a test may change."""
  return shutil.copytree(exported, tmp_path / "copy")


def weights_of(folder):
  model = pretrained.find(str(folder))
  mesh = meshes.make_mesh_on(jax.devices()[:1], 1, 1, 1)
  placed = pretrained.shardings(network.Bagel(model.sizes), mesh)
  policy = {path: x for path, x in placed.items() if "/layers/" in path}
  return flat(model.weights(policy, None))


class TestExport:
  def test_has_the_names_and_layouts_of_pytorch(self, exported, adapters):
    tensors = safetensors.numpy.load_file(exported / peft_files.WEIGHTS_FILE)
    arrays = flat(adapters)
    a, b = (arrays[f"layers/und/q/lora_{x}"][1] for x in "ab")
    name = f"{PREFIX}1.self_attn.q_proj"
    np.testing.assert_array_equal(tensors[f"{name}.lora_A.weight"], a.T)
    rows = b.reshape(LORA.rank, -1)  # heads and their widths are one axis there
    np.testing.assert_array_equal(tensors[f"{name}.lora_B.weight"], rows.T)
    a, b = (arrays[f"layers/gen/o/lora_{x}"][0] for x in "ab")
    name = f"{PREFIX}0.self_attn.o_proj_moe_gen"
    columns = a.reshape(-1, LORA.rank)
    np.testing.assert_array_equal(tensors[f"{name}.lora_A.weight"], columns.T)
    np.testing.assert_array_equal(tensors[f"{name}.lora_B.weight"], b.T)
    num_layers = arrays["layers/und/q/lora_a"].shape[0]
    assert len(tensors) == 2 * 5 * num_layers

  def test_config_names_base_and_modules(self, exported, tiny_model):
    config = json.loads((exported / peft_files.CONFIG_FILE).read_text())
    assert config["base_model_name_or_path"] == str(tiny_model)
    assert (config["r"], config["lora_alpha"]) == (2, 6.0)
    assert (
      "language_model.model.layers.0.mlp.down_proj"
      in (config["target_modules"])
    )

  def test_dtype_rounds(self, workdir, tmp_path):
    folder = export(workdir, tmp_path / "out", ml_dtypes.bfloat16)
    tensors = safetensors.numpy.load_file(folder / peft_files.WEIGHTS_FILE)
    assert {x.dtype for x in tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}

  def test_a_model_without_adapters_is_refused(self, tiny_model, tmp_path):
    with pytest.raises(ValueError, match="needs the workdir of one run with"):
      export(tiny_model, tmp_path / "out")


class TestImport:
  def test_is_the_same_model_to_the_last_bit(self, exported, workdir):
    found = weights_of(exported)
    expected = weights_of(workdir)
    assert found.keys() == expected.keys()
    for path, array in expected.items():
      np.testing.assert_array_equal(found[path], array, err_msg=path)

  def test_fingerprint_follows_the_adapter(self, copy, exported):
    before = pretrained.find(str(copy)).fingerprint()
    assert before == pretrained.find(str(exported)).fingerprint()
    path = copy / peft_files.WEIGHTS_FILE
    tensors = safetensors.numpy.load_file(path)
    tensors[f"{PREFIX}0.self_attn.q_proj.lora_A.weight"] += 1
    safetensors.numpy.save_file(tensors, path)
    assert pretrained.find(str(copy)).fingerprint() != before

  @pytest.mark.parametrize(
    "change, message",
    [
      ({"peft_type": "LOHA"}, "peft_type must be 'LORA'; it is 'LOHA'"),
      ({"use_dora": True, "r": 0}, "use_dora .* r must be a whole number"),
      ({"rank_pattern": {"q_proj": 4}}, "rank_pattern must be {}"),
      ({"base_model_name_or_path": ""}, "must name the model's folder"),
      ({"base_model_name_or_path": "nowhere"}, "the base of the adapter"),
      ({"r": 3}, "tensors differ: .* expected"),
    ],
  )
  def test_another_kind_of_adapter_is_refused(self, copy, change, message):
    path = copy / peft_files.CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
      pretrained.find(str(copy))

  def test_the_base_must_be_no_adapter(self, copy):
    path = copy / peft_files.CONFIG_FILE
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = str(copy)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="it is an adapter itself"):
      pretrained.find(str(copy))

  @pytest.mark.parametrize("name", ["missing", "unknown", "shape"])
  def test_other_tensors_are_refused(self, copy, name):
    path = copy / peft_files.WEIGHTS_FILE
    tensors = safetensors.numpy.load_file(path)
    matrix = tensors[f"{PREFIX}0.self_attn.q_proj.lora_A.weight"]
    if name == "missing":
      del tensors[f"{PREFIX}1.self_attn.q_proj.lora_B.weight"]
    elif name == "unknown":
      tensors[f"{PREFIX}0.lm_head.lora_A.weight"] = matrix
    else:
      tensors[f"{PREFIX}0.self_attn.q_proj.lora_A.weight"] = matrix[:, 1:]
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(ValueError, match="1 of .* tensors differ: base_model"):
      pretrained.find(str(copy))


@pytest.mark.torch
def test_peft_computes_the_same(exported, tiny_model):
  """PEFT finds every module, and its update of a layer is that of `low_rank`."""
  torch = pytest.importorskip("torch")
  peft = pytest.importorskip("peft")
  tensors = safetensors.numpy.load_file(exported / peft_files.WEIGHTS_FILE)
  base = safetensors.numpy.load_file(tiny_model / "ema.safetensors")
  names = {
    name.removeprefix("base_model.model.").rpartition(".lora_")[0]
    for name in tensors
  }
  model = torch.nn.Module()
  for name in names:
    weight = torch.from_numpy(np.float32(base[f"{name}.weight"]))
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight
    parent = model
    *path, last = name.split(".")
    for part in path:
      if not hasattr(parent, part):
        parent.add_module(part, torch.nn.Module())
      parent = getattr(parent, part)
    parent.add_module(last, layer)
  adapted = peft.PeftModel.from_pretrained(model, exported)
  merged = weights_of(exported)
  kernel = merged["policy/layers/gen/gate/kernel"][1]
  x = np.random.default_rng(0).normal(size=(3, kernel.shape[0]))
  x = x.astype(np.float32)
  layers = adapted.base_model.model.language_model.model.layers
  layer = getattr(layers, "1").mlp_moe_gen.gate_proj
  with torch.inference_mode():
    theirs = layer(torch.from_numpy(x)).numpy()
  np.testing.assert_allclose(theirs, x @ kernel, rtol=1e-4, atol=1e-4)

"""Tests of reading, writing and checking BAGEL's released files."""

import collections
import json
import math
import pathlib

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from r3jax.checkpoint import bagel_config
from r3jax.checkpoint import bagel_files
from r3jax.checkpoint import bagel_names
from r3jax.model import architecture
from r3jax.model import autoencoder
from r3jax.model import siglip
from r3jax.sequence import protocol

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "tiny-a"
NORM = "language_model.model.norm.weight"
GATE = "language_model.model.layers.1.mlp_moe_gen.gate_proj.weight"
CONV = "encoder.down.0.downsample.conv.weight"


def _tiny() -> architecture.BagelConfig:
  """Returns sizes with no two widths alike, two autoencoder levels and grouped queries."""
  return architecture.BagelConfig(
    llm=architecture.LLMConfig(16, 20, 3, 4, 2, 11),
    vision=architecture.VisionConfig(12, 18, 2, 3, 4, 5),
    autoencoder=architecture.AutoencoderConfig(
      32, (1, 2), 1, 6, scale=0.5, shift=0.25
    ),
    special_ids=protocol.SpecialIds(1, 2, 3, 4),
    max_latent_side=3,
    max_patches_per_side=5,
    autoencoder_transform=architecture.ImageTransform(12, 4, 4),
    vision_transform=architecture.ImageTransform(20, 8, 4),
  )


def _random_weights(config):
  rng = np.random.default_rng(0)
  num_layers = {
    "policy": config.llm.num_layers,
    "vision": config.vision.num_layers,
  }
  tree = {}
  for tensor in bagel_names.table(config):
    *parents, leaf = tensor.path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    stack = () if tensor.layer is None else (num_layers[parents[0]],)
    if leaf not in node:
      node[leaf] = rng.normal(size=stack + tensor.shape).astype(np.float32)
  return tree


@pytest.fixture(scope="module")
def config():
  return _tiny()


@pytest.fixture(scope="module")
def weights(config):
  return _random_weights(config)


@pytest.fixture
def folder(config, weights, tmp_path):
  bagel_files.save(weights, config, tmp_path)
  return tmp_path


def _edit(path: pathlib.Path, change):
  """Rewrites a safetensors file after `change` worked on its dict of tensors."""
  tensors = safetensors.numpy.load_file(path)
  change(tensors)
  safetensors.numpy.save_file(tensors, path)


class TestTable:
  @pytest.mark.parametrize(
    "sizes", [_tiny(), architecture.bagel_7b()], ids=["tiny", "bagel_7b"]
  )
  def test_leaves_are_those_of_the_modules(self, sizes):
    tower = siglip.VisionTransformer(sizes.vision)
    patches = jnp.zeros((1, 1, 3 * sizes.vision.patch_size**2))
    model = autoencoder.Autoencoder(
      sizes.autoencoder, latent_patch=sizes.latent_patch
    )
    pixels = jnp.zeros((1, sizes.pixels_per_token, sizes.pixels_per_token, 3))
    key = jax.random.key(0)
    trees = {
      "vision": jax.eval_shape(tower.init, key, patches, jnp.zeros(1, int))[
        "params"
      ],
      "autoencoder": jax.eval_shape(model.init, key, pixels)["params"],
    }
    leaves = flax.traverse_util.flatten_dict(nn.meta.unbox(trees), sep="/")
    stacked = (sizes.vision.num_layers,)
    expected = {
      tensor.path: tensor.shape
      if tensor.layer is None
      else stacked + tensor.shape
      for tensor in bagel_names.table(sizes)
      if not tensor.path.startswith("policy/")
    }
    assert {path: leaf.shape for path, leaf in leaves.items()} == expected


class TestExpectedShapes:
  def test_are_those_of_the_golden_files(self):
    seen = {}
    for name in ("ema", "ae"):
      seen |= safetensors.numpy.load_file(GOLDENS / f"{name}.safetensors")
    seen = {
      name: array.shape
      for name, array in seen.items()
      if "pos_embed" not in name
    }
    assert bagel_names.expected_shapes(bagel_config.load(GOLDENS)) == seen


def _count_parameters(config: architecture.BagelConfig) -> dict[str, int]:
  """Counts parameters by released prefix, the sin-cos tables included."""
  shapes = bagel_names.expected_shapes(config)
  for name, (width, side) in bagel_names.fixed_tables(config).items():
    shapes[name] = (side**2, width)
  counts = collections.Counter()
  for name, shape in shapes.items():
    prefix = name.split(".")[0]
    if prefix in ("encoder", "decoder"):
      prefix = "autoencoder"
    counts[prefix] += math.prod(shape)
  return dict(counts)


class TestParameters:
  def test_are_the_released_counts_for_bagel_7b(self):
    assert _count_parameters(architecture.bagel_7b()) == {
      "language_model": 14_141_252_608,
      "vit_model": 402_552_736,
      "connector": 16_980_992,
      "time_embedder": 13_769_728,
      "vae2llm": 232_960,
      "llm2vae": 229_440,
      "latent_pos_embed": 14_680_064,
      "vit_pos_embed": 17_561_600,
      "autoencoder": 83_819_683,
    }


class TestLoad:
  def test_gives_float32_leaves_in_the_layout_of_the_tree(self):
    config = bagel_config.load(GOLDENS)
    llm = config.llm
    weights = bagel_files.load(GOLDENS, config)
    released = safetensors.numpy.load_file(GOLDENS / "ema.safetensors")
    assert {leaf.dtype for leaf in jax.tree.leaves(weights)} == {
      np.dtype(np.float32)
    }
    gen = weights["policy"]["layers"]["gen"]
    name = "language_model.model.layers.2.self_attn.{}_proj_moe_gen.weight"
    q = released[name.format("q")].T.reshape(
      llm.hidden_size, llm.num_heads, llm.head_dim
    )
    o = released[name.format("o")].T.reshape(
      llm.num_heads, llm.head_dim, llm.hidden_size
    )
    np.testing.assert_array_equal(gen["q"]["kernel"][2], q)
    np.testing.assert_array_equal(gen["o"]["kernel"][2], o)
    released = safetensors.numpy.load_file(GOLDENS / "ae.safetensors")
    conv = released["decoder.up.1.upsample.conv.weight"]
    leaf = weights["autoencoder"]["decoder"]["up_1"]["upsample"]["conv"][
      "kernel"
    ]
    np.testing.assert_array_equal(leaf, np.transpose(conv, (2, 3, 1, 0)))

  def test_reads_model_safetensors_where_there_is_no_ema(
    self, folder, config, weights
  ):
    (folder / "ema.safetensors").rename(folder / "model.safetensors")
    loaded = bagel_files.load(folder, config)
    jax.tree.map(np.testing.assert_array_equal, loaded, weights)

  def test_ignores_sincos_tables_of_any_size_or_none(
    self, folder, config, weights
  ):
    def change(tensors):
      tensors["latent_pos_embed.pos_embed"] = np.zeros((7, 16), np.float32)
      del tensors["vit_pos_embed.pos_embed"]

    _edit(folder / "ema.safetensors", change)
    loaded = bagel_files.load(folder, config)
    jax.tree.map(np.testing.assert_array_equal, loaded, weights)

  @pytest.mark.parametrize(
    "file, change, message",
    [
      (
        "ema",
        lambda t: t.pop(NORM),
        rf"missing tensor {NORM}: expected shape \(16,\)",
      ),
      (
        "ema",
        lambda t: t.pop(GATE),
        rf"missing tensor {GATE}: expected shape \(20, 16\)",
      ),
      (
        "ae",
        lambda t: t.pop(CONV),
        rf"missing tensor {CONV}: expected shape \(32, 32, 3, 3\)",
      ),
      (
        "ema",
        lambda t: t.update({GATE: t[GATE].T.copy()}),
        rf"mis-shaped tensor {GATE}: expected shape \(20, 16\), seen \(16, 20\)",
      ),
      (
        "ema",
        lambda t: t.update({NORM: t[NORM][:, None]}),
        rf"mis-shaped tensor {NORM}: expected shape \(16,\), seen \(16, 1\)",
      ),
      (
        "ae",
        lambda t: t.update({CONV: t[CONV][..., :1].copy()}),
        rf"mis-shaped tensor {CONV}: expected shape \(32, 32, 3, 3\), seen \(32, 32, 3, 1\)",
      ),
      (
        "ema",
        lambda t: t.update({GATE.replace(".1.", ".3."): t[GATE]}),
        r"unexpected tensor .*layers\.3\.mlp_moe_gen.*: seen shape \(20, 16\)",
      ),
      (
        "ae",
        lambda t: t.update(extra=np.zeros(2, np.float32)),
        r"unexpected tensor extra: seen shape \(2,\)",
      ),
      (
        "ema",
        lambda t: t.update({NORM: np.ones(16, np.int64)}),
        rf"wrong dtype of tensor {NORM}: expected one of F32, F16, BF16, seen I64",
      ),
    ],
  )
  def test_names_the_tensor_for_a_damaged_file(
    self, folder, config, file, change, message
  ):
    _edit(folder / f"{file}.safetensors", change)
    with pytest.raises(ValueError, match=message) as error:
      bagel_files.load(folder, config)
    assert "1 problem(s)" in str(error.value)

  def test_lists_all_problems_of_both_files_at_once(self, folder, config):
    extra = {"extra": np.zeros(1, np.float32)}
    _edit(folder / "ema.safetensors", lambda t: (t.pop(NORM), t.update(extra)))
    _edit(folder / "ae.safetensors", lambda t: t.pop(CONV))
    with pytest.raises(ValueError, match=r"3 problem\(s\)") as error:
      bagel_files.load(folder, config)
    for expected in (
      f"missing tensor {NORM}",
      "unexpected tensor extra",
      f"missing tensor {CONV}",
    ):
      assert expected in str(error.value)

  def test_lists_missing_files_at_once(self, tmp_path, config):
    with pytest.raises(ValueError, match=r"2 problem\(s\)") as error:
      bagel_files.load(tmp_path, config)
    assert "missing file ema.safetensors or model.safetensors" in str(
      error.value
    )
    assert "missing file ae.safetensors" in str(error.value)

  def test_refuses_a_missing_folder(self, tmp_path, config):
    with pytest.raises(ValueError, match="not found: .*nowhere"):
      bagel_files.load(tmp_path / "nowhere", config)

  @pytest.mark.parametrize("kept", [0, 5, 1000, -1])
  def test_refuses_a_truncated_file(self, folder, config, kept):
    path = folder / "ema.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="unreadable file .*ema.safetensors"):
      bagel_files.load(folder, config)

  def test_refuses_weights_of_another_size(self, folder):
    with pytest.raises(
      ValueError, match="mis-shaped tensor connector.fc1.bias"
    ):
      bagel_files.load(folder, architecture.bagel_7b())


class TestSave:
  def test_round_trip_is_bit_exact_in_float32(self, folder, config, weights):
    loaded = bagel_files.load(folder, config)
    jax.tree.map(np.testing.assert_array_equal, loaded, weights)

  def test_writes_the_golden_tensors_back(self, tmp_path):
    config = bagel_config.load(GOLDENS)
    bagel_files.save(bagel_files.load(GOLDENS, config), config, tmp_path)
    for name in ("ema.safetensors", "ae.safetensors"):
      written = safetensors.numpy.load_file(tmp_path / name)
      released = safetensors.numpy.load_file(GOLDENS / name)
      assert written.keys() == released.keys()
      for key, array in released.items():
        atol = 1e-6 if "pos_embed" in key else 0  # recomputed
        np.testing.assert_allclose(written[key], array, atol=atol, rtol=0)

  def test_configs_read_back_as_the_same_sizes(self, folder, config):
    assert bagel_config.load(folder) == config

  def test_leaves_only_the_five_files(self, folder):
    assert sorted(path.name for path in folder.iterdir()) == [
      "ae.safetensors",
      "constants.json",
      "ema.safetensors",
      "llm_config.json",
      "vit_config.json",
    ]

  @pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
  def test_rounds_to_a_narrow_dtype_and_reads_it_back(
    self, config, weights, tmp_path, dtype
  ):
    bagel_files.save(weights, config, tmp_path, dtype)
    for name in ("ema.safetensors", "ae.safetensors"):
      assert {
        a.dtype for a in safetensors.numpy.load_file(tmp_path / name).values()
      } == {np.dtype(dtype)}
    loaded = bagel_files.load(tmp_path, config)
    rounded = jax.tree.map(
      lambda x: x.astype(dtype).astype(np.float32), weights
    )
    jax.tree.map(np.testing.assert_array_equal, loaded, rounded)

  def test_takes_device_arrays(self, config, weights, tmp_path):
    bagel_files.save(jax.tree.map(jnp.asarray, weights), config, tmp_path)
    loaded = bagel_files.load(tmp_path, config)
    jax.tree.map(np.testing.assert_array_equal, loaded, weights)

  def test_lists_wrong_weights_and_writes_nothing(
    self, config, weights, tmp_path
  ):
    damaged = dict(weights, vision=dict(weights["vision"], extra=np.zeros(3)))
    damaged["policy"] = dict(
      weights["policy"], lm_head={"kernel": np.zeros((11, 16))}
    )
    del damaged["autoencoder"]
    with pytest.raises(ValueError) as error:
      bagel_files.save(damaged, config, tmp_path / "new")
    text = str(error.value)
    assert (
      "mis-shaped leaf policy/lm_head/kernel: expected shape (16, 11), seen (11, 16)"
      in text
    )
    assert "unexpected leaf vision/extra: seen shape (3,)" in text
    assert "missing leaf autoencoder/decoder/" in text
    # Not all that are missing: a screen has some 2,000 characters.
    assert "122 problem(s)" in text and "... and 115 more" in text
    assert not (tmp_path / "new").exists()

  def test_refuses_a_dtype_that_is_no_release_dtype(
    self, config, weights, tmp_path
  ):
    with pytest.raises(
      ValueError, match="float32, float16 or bfloat16; got float64"
    ):
      bagel_files.save(weights, config, tmp_path, np.float64)

  def test_writes_headers_that_name_the_format(self, folder):
    content = (folder / "ae.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert header["__metadata__"] == {"format": "pt"}

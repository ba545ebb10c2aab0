"""Tests exported weights in PyTorch: names, shapes, dtypes, and what layers compute with them.

They need the extra `torch`: `pip install -e .[torch]`, then `bash launch/test.sh -m torch`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r3jax.checkpoint import bagel_names
from r3jax.checkpoint import pretrained
from r3jax.model import network
from r3jax.parallel import meshes

pytestmark = pytest.mark.torch
LAYER = "language_model.model.layers.1."


@pytest.fixture(scope="module")
def weights(tiny_model):
  source = pretrained.find(str(tiny_model))
  mesh = meshes.make_mesh_on(jax.devices()[:1], 1, 1, 1)
  return source, source.weights(
    pretrained.shardings(network.Bagel(source.sizes), mesh), jnp.bfloat16
  )


@pytest.fixture(scope="module")
def exported(weights, tmp_path_factory):
  from safetensors import torch as safetensors_torch

  folder = tmp_path_factory.mktemp("exported")
  pretrained.save(weights[1], weights[0], folder, "bagel")
  return {
    name: safetensors_torch.load_file(folder / f"{name}.safetensors")
    for name in ("ema", "ae")
  }


def test_names_shapes_and_dtypes_are_the_released_ones(weights, exported):
  import torch

  sizes = weights[0].sizes
  seen = {
    name: tuple(tensor.shape)
    for file in exported.values()
    for name, tensor in file.items()
  }
  tables = {
    name: (side**2, width)
    for name, (width, side) in bagel_names.fixed_tables(sizes).items()
  }
  assert seen == bagel_names.expected_shapes(sizes) | tables
  assert {
    tensor.dtype for file in exported.values() for tensor in file.values()
  } == {torch.bfloat16}


def test_a_linear_layer_computes_the_same(weights, exported):
  import torch

  gen = weights[1]["policy"]["layers"]["gen"]
  x = (
    np.random.default_rng(0)
    .normal(size=(5, weights[0].sizes.llm.hidden_size))
    .astype(np.float32)
  )
  layer = torch.nn.Linear(x.shape[1], x.shape[1])
  parameters = {
    kind: exported["ema"][f"{LAYER}self_attn.q_proj_moe_gen.{kind}"]
    for kind in ("weight", "bias")
  }
  layer.load_state_dict(parameters)
  kernel, bias = (
    np.asarray(gen["q"][name][1], np.float32) for name in ("kernel", "bias")
  )
  ours = np.einsum("bd,dhk->bhk", x, kernel) + bias
  theirs = layer.float()(torch.from_numpy(x)).detach().numpy()
  np.testing.assert_allclose(ours.reshape(theirs.shape), theirs, atol=1e-5)


def test_a_convolution_computes_the_same(weights, exported):
  import torch

  kernel = np.asarray(
    weights[1]["autoencoder"]["encoder"]["conv_in"]["kernel"], np.float32
  )
  x = np.random.default_rng(0).normal(size=(1, 6, 6, 3)).astype(np.float32)
  ours = jax.lax.conv_general_dilated(
    x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  weight = exported["ae"]["encoder.conv_in.weight"].float()
  theirs = torch.nn.functional.conv2d(
    torch.from_numpy(x.transpose(0, 3, 1, 2)), weight, padding=1
  )
  np.testing.assert_allclose(
    ours, theirs.numpy().transpose(0, 2, 3, 1), atol=1e-5
  )

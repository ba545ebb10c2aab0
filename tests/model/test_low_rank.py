"""Tests of the low-rank adapters: settings, the projection, gradients, joining and merging."""

import flax.linen as nn
import flax.traverse_util
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from r3jax.model import architecture
from r3jax.model import layers
from r3jax.model import low_rank
from r3jax.model import network
from r3jax.model import parameters
from r3jax.parallel import meshes
from r3jax.sequence import segments
from tests import goldens_lib

LORA = low_rank.LoRA(3, 6.0, low_rank.PROJECTIONS, ("q", "o", "down"))
LAYOUT = segments.Layout(
  (segments.text("prompt", 5), segments.image("draft", "noise", (2, 2)))
)


def _model(remat: str = "none") -> network.Bagel:
  return network.Bagel(goldens_lib.config(), remat=remat, lora=LORA)


@pytest.fixture(scope="module")
def base():
  return goldens_lib.weights()["policy"]


@pytest.fixture(scope="module")
def fresh():
  """Adapters as a run starts with them, on 8 devices."""
  return parameters.init_adapters(
    _model(), meshes.make_mesh_on(jax.devices(), 2, 2, 2), 0
  )


@pytest.fixture(scope="module")
def adapters(fresh):
  """Adapters with A and B drawn."""
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(0, 0.1, leaf.shape), jnp.float32), fresh
  )


def _energy(model: network.Bagel, policy):
  """Returns a number that both experts' hidden states weigh on, and these."""
  c = goldens_lib.config()
  latent = jax.random.normal(jax.random.key(0), (2, 4, c.latent_dim))
  inputs = {
    "prompt": jnp.array([[1, 9, 4, 5, 2]] * 2),
    "draft": network.Noised(latent, jnp.array([0.3, 0.8])),
  }
  hidden = model.apply(
    {"params": policy}, LAYOUT, inputs, {"prompt": jnp.array([5, 3])}
  ).hidden

  def weight(x):
    return jax.random.normal(jax.random.key(1), x.shape)

  return jnp.sum(hidden.und * weight(hidden.und)) + jnp.sum(
    hidden.gen * weight(hidden.gen)
  ), hidden


@jax.jit
def _hidden(policy):
  return _energy(_model(), policy)[1]


class TestLoRA:
  @pytest.mark.parametrize(
    "settings, message",
    [
      ((-1, 1.0, ("q",)), "rank must be at least 0 .* got -1"),
      ((2, 0.0, ("q",)), "alpha must be above 0; got 0.0"),
      (
        (2, 1.0, ("q", "lm_head")),
        r"und must be a tuple of names among \['q', 'k', 'v', 'o', 'gate', 'up', 'down'\]; "
        r"got \('q', 'lm_head'\)",
      ),
      ((2, 1.0, (), ("q,k",)), r"gen must be .*; got \('q,k',\)"),
      (
        (2, 1.0),
        "model.lora.und or model.lora.gen must name a projection "
        "where model.lora.rank is above 0; it is 2",
      ),
    ],
  )
  def test_refuses_what_makes_no_sense(self, settings, message):
    with pytest.raises(ValueError, match=message):
      low_rank.LoRA(*settings)

  def test_a_rank_is_at_most_the_smaller_side(self):
    sizes = architecture.LLMConfig(
      hidden_size=32, intermediate_size=64, num_heads=4, num_kv_heads=2
    )
    low_rank.LoRA(16, 1.0, ("k",), ("down",)).check(sizes)
    with pytest.raises(
      ValueError,
      match=r"rank \(17\) must be at most the smaller side .* for k 32x16$",
    ):
      low_rank.LoRA(17, 1.0, ("q", "k"), ("down",)).check(sizes)

  def test_is_one_setting_whether_read_as_tuples_or_lists(self):
    assert low_rank.LoRA(2, 1.0, ["q"], ["v"]) == low_rank.LoRA(
      2, 1.0, ("q",), ("v",)
    )
    assert (
      len(
        {
          low_rank.LoRA(2, 1.0, ["q"]),
          low_rank.LoRA(2, 1.0, ("q",)),
          low_rank.LoRA(),
        }
      )
      == 2
    )


class TestProjection:
  @pytest.mark.parametrize(
    "features, axes, contracted, num_parts",
    [
      ((4, 5), ("embed", "heads", "head_dim"), 1, 1),
      ((6,), ("heads", "head_dim", "embed"), 2, 1),
      ((6,), ("heads", "head_dim", "embed"), 2, 4),
    ],
  )
  def test_adds_the_scaled_product(self, features, axes, contracted, num_parts):
    x = jax.random.normal(jax.random.key(0), (2, 3, 8, 7))
    module = layers.Projection(
      features, axes, contracted, True, rank=3, scale=0.7, num_parts=num_parts
    )
    boxed = module.init(jax.random.key(1), x)["params"]
    inputs, outputs = axes[:contracted], axes[contracted:]
    assert (boxed["lora_a"].names, boxed["lora_b"].names) == (
      (*inputs, "rank"),
      ("rank", *outputs),
    )
    params = nn.unbox(boxed) | {
      "lora_b": jax.random.normal(jax.random.key(2), (3, *features))
    }
    a, b, kernel = (
      np.asarray(params[name], np.float64)
      for name in ("lora_a", "lora_b", "kernel")
    )
    whole = kernel + 0.7 * np.tensordot(a, b, 1)
    np.testing.assert_allclose(
      module.apply({"params": params}, x),
      np.tensordot(x, whole, contracted),
      atol=2e-5,
    )

  @pytest.mark.parametrize("num_parts", [1, 4])
  def test_small_update_is_not_lost_in_bfloat16(self, num_parts):
    """Added to a rounded product, 5 % of this update would reach the output."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(256, 1024)), jnp.bfloat16)
    module = layers.Projection(
      (1024,),
      ("a", "b"),
      dtype=jnp.bfloat16,
      rank=16,
      scale=2.0,
      num_parts=num_parts,
    )
    params = nn.unbox(module.init(jax.random.key(1), x)["params"])
    before = module.apply({"params": params}, x)
    # As after two updates at a learning rate of 5e-6.
    params |= {"lora_b": jnp.asarray(rng.normal(0, 1e-5, (16, 1024)))}
    after = module.apply({"params": params}, x)
    assert after.dtype == jnp.bfloat16
    change = np.asarray(after, np.float64) - np.asarray(before, np.float64)
    a, b = (np.asarray(params[name], np.float64) for name in layers.ADAPTERS)
    update = 2.0 * np.asarray(x, np.float64) @ a @ b
    # Rounding makes single changes rough, and their regression on the update right.
    assert (change * update).sum() / (update**2).sum() == pytest.approx(
      1, abs=0.1
    )

  def test_devices_send_parts_in_bfloat16(self):
    """They sum over parts of the inputs: in float32 that is twice as much to send."""
    x = jnp.ones((2, 8), jnp.bfloat16)
    module = layers.Projection(
      (6,), ("a", "b"), dtype=jnp.bfloat16, rank=2, num_parts=4
    )
    params = module.init(jax.random.key(0), x)
    program = jax.make_jaxpr(module.apply)(params, x)
    (parts,) = [
      equation.invars[0].aval
      for equation in program.jaxpr.eqns
      if equation.primitive.name in ("reduce", "reduce_sum")
    ]
    assert (parts.shape, parts.dtype) == ((4, 2, 6), jnp.bfloat16)

  def test_starts_as_the_map_without_an_update(self):
    x = jax.random.normal(jax.random.key(0), (64, 256))
    module = layers.Projection((128,), ("a", "b"), rank=64)
    params = nn.unbox(module.init(jax.random.key(1), x)["params"])
    assert 0.9 < float(jnp.var(x @ params["lora_a"])) < 1.1
    assert not params["lora_b"].any()
    plain = layers.Projection((128,), ("a", "b")).apply(
      {"params": {"kernel": params["kernel"]}}, x
    )
    np.testing.assert_array_equal(module.apply({"params": params}, x), plain)

  def test_is_the_plain_map_of_parameters_without_adapters(self):
    x = jnp.ones((2, 8))
    module = layers.Projection((4,), ("a", "b"), rank=2)
    kernel = {"params": {"kernel": jnp.ones((8, 4))}}
    np.testing.assert_array_equal(
      module.apply(kernel, x), jnp.full((2, 4), 8.0)
    )
    products = str(jax.make_jaxpr(module.apply)(kernel, x)).count("dot_general")
    assert products == 1


class TestPolicy:
  def test_adapters_are_where_they_are_asked_for(self, base, adapters):
    flat = flax.traverse_util.flatten_dict(adapters, sep="/")
    assert set(flat) == {
      f"layers/{expert}/{name}/{part}"
      for expert, names in (("und", LORA.und), ("gen", LORA.gen))
      for name in names
      for part in layers.ADAPTERS
    }
    joined = low_rank.join(base, adapters)
    jax.tree.map(
      np.testing.assert_array_equal, low_rank.adapters(joined), adapters
    )
    assert len(jax.tree.leaves(joined)) == len(jax.tree.leaves(base)) + len(
      flat
    )
    jax.tree.map(np.testing.assert_array_equal, low_rank.join(base, {}), base)
    assert low_rank.join(None, base) is base

  def test_new_adapters_change_nothing(self, base, fresh):
    # [L, D, r] of variance 1 / D
    gate = np.asarray(fresh["layers"]["und"]["gate"]["lora_a"])
    assert 0.7 < float(gate.var() * gate.shape[1]) < 1.4
    assert not np.array_equal(gate[0], gate[1])
    jax.tree.map(
      np.testing.assert_array_equal,
      _hidden(low_rank.join(base, jax.device_get(fresh))),
      _hidden(base),
    )

  def test_new_adapters_are_sharded_as_their_kernels(self, fresh):
    def spec(expert, name, part):
      return tuple(fresh["layers"][expert][name][part].sharding.spec)

    assert spec("und", "q", "lora_a") == (None, "fsdp", None)
    assert spec("gen", "q", "lora_b") == (None, None, "tensor", None)
    assert spec("gen", "down", "lora_a") == (None, "tensor", None)

  def test_merged_equals_joined(self, base, adapters):
    policies = (
      low_rank.join(base, adapters),
      low_rank.merge(base, adapters, LORA.scale),
      base,
    )
    joined, merged, plain = (_hidden(policy) for policy in policies)
    for expert in ("und", "gen"):
      found, expected, start = (
        getattr(hidden, expert) for hidden in (joined, merged, plain)
      )
      np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
      assert np.abs(found - start).max() > 0.1

  def test_gradients_are_those_of_the_merged_kernels_projected(
    self, base, adapters
  ):
    """dL/dA = s (dL/dW) B^T and dL/dB = s A^T (dL/dW) at the merged W."""

    def scalar(policy):
      return _energy(_model(), policy)[0]

    found = jax.jit(
      jax.grad(lambda trained: scalar(low_rank.join(base, trained)))
    )(adapters)
    of_kernels = jax.jit(jax.grad(scalar))(
      low_rank.merge(base, adapters, LORA.scale)
    )
    for expert, name, count in (
      ("und", "q", 1),
      ("und", "k", 1),
      ("gen", "o", 2),
      ("gen", "down", 1),
    ):

      def get(tree, leaf, expert=expert, name=name):
        return np.asarray(tree["layers"][expert][name][leaf], np.float64)

      kernel, a, b = (
        get(of_kernels, "kernel"),
        get(adapters, "lora_a"),
        get(adapters, "lora_b"),
      )

      def matrix(x, inputs):
        return x.reshape(x.shape[0], int(np.prod(x.shape[1 : 1 + inputs])), -1)

      w, a, b = matrix(kernel, count), matrix(a, count), matrix(b, 1)
      expected_a, expected_b = (
        LORA.scale * w @ b.swapaxes(1, 2),
        LORA.scale * a.swapaxes(1, 2) @ w,
      )
      np.testing.assert_allclose(
        matrix(get(found, "lora_a"), count),
        expected_a,
        atol=1e-3 * np.abs(expected_a).max(),
      )
      np.testing.assert_allclose(
        matrix(get(found, "lora_b"), 1),
        expected_b,
        atol=1e-3 * np.abs(expected_b).max(),
      )

  def test_backward_pass_makes_no_gradient_of_a_kernel(self, base, adapters):
    model = _model(remat="full")

    def scalar(policy):
      return _energy(model, policy)[0]

    of_all = jax.make_jaxpr(jax.grad(scalar))(low_rank.join(base, adapters))
    of_adapters = jax.make_jaxpr(
      jax.grad(lambda trained: scalar(low_rank.join(base, trained)))
    )(adapters)
    # Only a gradient has the shape of a kernel of the MLP: no activation is [D, M] or [M, D].
    llm = goldens_lib.config().llm
    sides = {
      (llm.hidden_size, llm.intermediate_size),
      (llm.intermediate_size, llm.hidden_size),
    }

    def count(jaxpr):
      return sum(shape in sides for shape in _products(jaxpr.jaxpr))

    assert count(of_all) >= 6 and count(of_adapters) == 0


def _products(jaxpr):
  """Yields the shapes that matrix products make, in all inner jaxprs."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      yield equation.outvars[0].aval.shape
    for inner in jax.extend.core.jaxprs_in_params(equation.params):
      yield from _products(inner)

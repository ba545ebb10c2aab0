"""Tests of the sharding rules: where dimensions go, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import r3_geneval
from r3jax.model import architecture
from r3jax.model import network
from r3jax.model import parameters
from r3jax.parallel import meshes
from r3jax.parallel import sharding
from tests import tiny

P = jax.sharding.PartitionSpec
WIDE = sharding.Rules.of(
  {"mlp": ("fsdp", "tensor"), "heads": ("tensor",), "rows": ("fsdp",)}
)


def _spec(of: sharding.Rules, shape, names, manual=True, **kwargs) -> P:
  """Returns the spec on a 2 x 2 x 2 mesh, inside the mapped step or outside."""
  with jax.set_mesh(meshes.make_mesh_on(jax.devices(), 2, 2, 2)):
    found = []

    def look(x):
      found.append(of.spec(shape, names, **kwargs))
      return x

    mapped = (
      jax.shard_map(
        look, in_specs=P(), out_specs=P(), axis_names={"data"}, check_vma=False
      )
      if manual
      else look
    )
    jax.eval_shape(jax.jit(mapped), jnp.zeros(2))
  return found[0]


class TestSpec:
  def test_rows_and_heads_are_split(self):
    assert _spec(
      sharding.TRAIN, (4, 9, 2, 8), ("rows", None, "heads", None)
    ) == P(("fsdp",), None, ("tensor",), None)

  def test_rows_give_way(self):
    assert _spec(WIDE, (4, 9, 8), ("rows", None, "mlp")) == P(
      None, None, ("fsdp", "tensor")
    )
    assert _spec(WIDE, (4, 9, 8), ("rows", None, None), without="mlp") == P(
      None, None, None
    )
    assert _spec(WIDE, (4, 9, 8), ("rows", None, None)) == P(
      ("fsdp",), None, None
    )

  def test_what_does_not_divide_stays_whole(self):
    assert _spec(sharding.TRAIN, (3, 9, 5), ("rows", None, "mlp")) == P(
      None, None, None
    )

  def test_outside_the_mapped_step_rows_are_split_over_replicas_too(self):
    assert _spec(sharding.TRAIN, (4, 9), ("rows", None), manual=False) == P(
      ("data", "fsdp"), None
    )

  def test_nothing_is_split_without_a_mesh(self):
    assert (
      sharding.TRAIN.constrain(jnp.ones((4, 8)), "rows", "mlp").tolist()
      == np.ones((4, 8)).tolist()
    )


class TestOf:
  @pytest.mark.parametrize(
    "axes, unknown",
    [({"width": ("fsdp",)}, "width"), ({"mlp": ("data",)}, "data")],
  )
  def test_unknown_axis_is_refused(self, axes, unknown):
    with pytest.raises(
      ValueError, match=f"sharding rules must map .* unknown: .*{unknown}"
    ):
      sharding.Rules.of(axes)


class TestFullSize:
  def test_all_parameters_of_the_7b_model_split_over_32_chips(self):
    """Training splits every matrix of a layer 32 ways, rollouts over fsdp only the table."""
    bagel = network.Bagel(architecture.bagel_7b(), jnp.bfloat16)
    boxed = parameters.boxed(bagel)
    train = sharding.parameter_specs(boxed, sharding.TRAIN)
    layer = train["layers"]["gen"]
    assert layer["gate"]["kernel"] == P(None, ("fsdp",), ("tensor",))
    assert layer["k"]["kernel"] == P(None, ("fsdp",), ("tensor",), None)
    assert train["embed_tokens"]["embedding"] == P(None, ("fsdp", "tensor"))
    assert train["lm_head"]["kernel"] == P(("fsdp",), ("tensor",))

  def test_small_chips_spread_only_what_decodes_text(self):
    """The hidden states of a denoising step are larger than the matrices they would travel to."""
    config = r3_geneval.get_config("v5e-256")
    rules = sharding.Rules.of(config.sharding.rollout.to_dict())
    bagel = network.Bagel(architecture.bagel_7b(), jnp.bfloat16)
    rollout = sharding.parameter_specs(parameters.boxed(bagel), rules)
    und = rollout["layers"]["und"]["gate"]["kernel"]
    gen = rollout["layers"]["gen"]["gate"]["kernel"]
    assert und == P(None, None, ("fsdp", "tensor"))
    assert gen == P(None, None, ("tensor",))


class TestNarrowed:
  def test_forward_pass_is_the_same_bit_by_bit(self, tiny_model):
    session = tiny.make_bench(tiny_model, changes={"model.dtype": "bfloat16"})
    bagel, policy = session.stages.modules.bagel, session.policy
    narrow = parameters.narrowed(policy, jnp.bfloat16)
    assert (
      policy["norm"]["und"]["scale"].dtype
      == narrow["norm"]["und"]["scale"].dtype
      == jnp.float32
    )
    assert (
      narrow["layers"]["gen"]["q"]["kernel"].dtype
      == narrow["layers"]["gen"]["q"]["bias"].dtype
      == jnp.bfloat16
    )
    hidden = jnp.ones((1, 2, bagel.config.llm.hidden_size), jnp.bfloat16)
    for method, inputs in (
      ("logits", hidden),
      ("velocity", hidden),
      ("embed_time", jnp.ones(1)),
      ("embed_tokens", jnp.array([[1, 2]])),
    ):

      def call(module, x, method=method):
        return getattr(module, method)(x)

      wide_result = bagel.apply({"params": policy}, inputs, method=call)
      narrow_result = bagel.apply({"params": narrow}, inputs, method=call)
      np.testing.assert_array_equal(wide_result, narrow_result)


class TestOverRows:
  @pytest.mark.parametrize("rows, at_once", [(5, 1), (5, 2), (8, 8)])
  @pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
  def test_is_the_function_of_all_rows(self, rows, at_once, shape):

    def function(shared, x):
      return jnp.cumsum(x, axis=1) * shared["scale"]

    x = jnp.arange(2.0 * rows * 3).reshape(2 * rows, 3)
    split, whole = P("data"), P()

    def mapped(shared, x):
      return sharding.over_rows(function, shared, x, at_once)

    mesh = meshes.make_mesh_on(jax.devices()[: np.prod(shape)], *shape)
    with jax.set_mesh(mesh):
      run = jax.jit(
        jax.shard_map(
          mapped,
          in_specs=(whole, split),
          out_specs=split,
          axis_names={"data"},
          check_vma=False,
        )
      )
      found = run({"scale": jnp.float32(3)}, x)
    np.testing.assert_array_equal(found, 3 * np.cumsum(x, axis=1))

"""The trained parameters as a tree: drawn, placed on a mesh, narrowed to what a forward pass reads."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from r3jax import types
from r3jax.model import layers
from r3jax.model import low_rank
from r3jax.model import network
from r3jax.parallel import sharding
from r3jax.sequence import layouts


def init(bagel: network.Bagel, key: types.Key):
  """Returns a freshly drawn policy, adapters included, boxed with logical axis names."""
  # no parameter depends on them
  c = layouts.Capacities(1, 1, 1, 1, 1, 1, latent_grid=(1, 1), vit_grid=(1, 1))
  inputs = {
    "source": network.Noised(
      jnp.zeros((1, 1, bagel.config.latent_dim)), jnp.zeros(1)
    ),
    "vision": jnp.zeros((1, 1, bagel.config.vision.hidden_size)),
    "instruction": jnp.zeros((1, 1), jnp.int32),
  }
  lengths = {"instruction": jnp.ones(1, jnp.int32)}
  plain = bagel.clone(attention="xla")  # the kernel wants longer segments
  return plain.init(
    key, layouts.refine(c), inputs, lengths, method="everything"
  )["params"]


def boxed(bagel: network.Bagel):
  """Returns the shapes of a policy, adapters included, boxed with logical axis names."""
  return jax.eval_shape(lambda: init(bagel, jax.random.key(0)))


def unboxed(bagel: network.Bagel) -> types.Params:
  """Returns the shapes of a policy, adapters included."""
  return nn.unbox(boxed(bagel))


def shardings(bagel: network.Bagel, mesh: jax.sharding.Mesh) -> types.Params:
  """Returns the sharding of every parameter of a policy, adapters included.

  Raises:
    ValueError: a sharded dimension does not divide over its mesh axes; lists all.
  """
  return sharding.parameter_shardings(boxed(bagel), bagel.rules, mesh)


def init_adapters(
  bagel: network.Bagel, mesh: jax.sharding.Mesh, seed: int
) -> types.Params:
  """Returns the sharded adapters of a policy that still is its base, in float32 or the wider dtype computed in."""
  dtype = layers.at_least_float32(bagel.dtype)

  def draw(seed):
    found = low_rank.adapters(nn.unbox(init(bagel, jax.random.key(seed))))
    return jax.tree.map(lambda x: x.astype(dtype), found)

  # Compiled, so that the rest of the policy is not drawn.
  return jax.jit(draw, out_shardings=low_rank.adapters(shardings(bagel, mesh)))(
    np.uint32(seed)
  )


def placed(bagel: network.Bagel, policy: types.Params) -> types.Params:
  """Asks the compiler, inside a compiled function, to put parameters where the rules of `bagel` say."""
  if jax.sharding.get_abstract_mesh().empty:
    return policy
  return jax.lax.with_sharding_constraint(
    policy, sharding.parameter_specs(boxed(bagel), bagel.rules)
  )


def narrowed(params: types.Params, dtype: types.DType) -> types.Params:
  """Returns parameters in the dtype that a forward pass computes in, with the same results.

  Norms read their parameters in float32 whatever they compute in; these stay as they are.
  """
  if "kernel" in params or "embedding" in params:
    return {name: leaf.astype(dtype) for name, leaf in params.items()}
  return {
    name: narrowed(part, dtype) if isinstance(part, dict) else part
    for name, part in params.items()
  }

"""The trained parameters as a tree: drawn, placed on a mesh, narrowed to the compute dtype."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from r3jax import types
from r3jax.model import layers
from r3jax.model import low_rank
from r3jax.model import network
from r3jax.parallel import sharding
from r3jax.sequence import layouts

# Modules outside of the experts that only latents use.
_GEN_ONLY = ("vae2llm", "llm2vae", "time_embedder")


def expert_of(path: Sequence[str]) -> str:
  """Returns the expert that a parameter goes with, "und" or "gen", given its path in the policy.

  What only text uses (embeddings, head, connector) goes with und, what only latents use with gen.
  """
  # A leaf of an expert's module has "und" or "gen" in its path.
  is_gen = "gen" in path or path[0] in _GEN_ONLY
  return "gen" if is_gen else "und"


def split_experts(policy: types.Params) -> tuple[types.Params, types.Params]:
  """Returns what goes with und and what goes with gen; `low_rank.join` makes the policy of both.

  Args:
    policy: parameters, or a tree like them: shapes, shardings.
  """
  parts: dict[str, dict] = {"und": {}, "gen": {}}
  for path, leaf in flax.traverse_util.flatten_dict(policy).items():
    parts[expert_of(path)][path] = leaf
  und = flax.traverse_util.unflatten_dict(parts["und"])
  gen = flax.traverse_util.unflatten_dict(parts["gen"])
  return und, gen


def init(bagel: network.Bagel, key: types.Key) -> Any:
  """Draws a policy, adapters included.

  Args:
    bagel: the model.
    key: PRNG key.

  Returns:
    float32 parameters, boxed with their logical axis names.
  """
  # No parameter depends on the sizes of the input.
  capacities = layouts.Capacities(
    system=1,
    prompt=1,
    thought=1,
    question=1,
    answer=1,
    instruction=1,
    latent_grid=(1, 1),
    vit_grid=(1, 1),
  )
  latent = jnp.zeros((1, 1, bagel.config.latent_dim))
  inputs = {
    "source": network.Noised(latent, jnp.zeros(1)),
    "siglip": jnp.zeros((1, 1, bagel.config.vision.hidden_size)),
    "instruction": jnp.zeros((1, 1), jnp.int32),
  }
  lengths = {"instruction": jnp.ones(1, jnp.int32)}
  plain = bagel.clone(attention="xla")  # the kernel needs longer segments
  variables = plain.init(
    key, layouts.refine(capacities), inputs, lengths, method="everything"
  )
  return variables["params"]


def boxed(bagel: network.Bagel) -> Any:
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
  """Draws adapters with which the policy still equals its base.

  Args:
    bagel: the model.
    mesh: where the adapters go.
    seed: of the PRNG key.

  Returns:
    Sharded adapters in the compute dtype, at least float32.
  """
  dtype = layers.at_least_float32(bagel.dtype)

  def draw(seed: jax.Array) -> types.Params:
    policy = nn.unbox(init(bagel, jax.random.key(seed)))
    adapters = low_rank.adapters(policy)
    return jax.tree.map(lambda x: x.astype(dtype), adapters)

  # Compiled, so that the rest of the policy is not drawn.
  # XLA removes what the adapters do not depend on.
  adapter_shardings = low_rank.adapters(shardings(bagel, mesh))
  draw_sharded = jax.jit(draw, out_shardings=adapter_shardings)
  return draw_sharded(np.uint32(seed))


def placed(bagel: network.Bagel, policy: types.Params) -> types.Params:
  """Constrains parameters, inside a compiled function, to the shardings of the rules of `bagel`."""
  if jax.sharding.get_abstract_mesh().empty:
    return policy
  specs = sharding.parameter_specs(boxed(bagel), bagel.rules)
  return jax.lax.with_sharding_constraint(policy, specs)


def narrowed(params: types.Params, dtype: types.DType) -> types.Params:
  """Returns parameters in the dtype that a forward pass computes in, with the same results.

  Norms read their parameters in float32 whatever they compute in; these stay as they are.
  """
  is_layer = "kernel" in params or "embedding" in params
  result = {}
  for name, part in params.items():
    if is_layer:
      result[name] = part.astype(dtype)
    elif isinstance(part, dict):
      result[name] = narrowed(part, dtype)
    else:
      result[name] = part
  return result

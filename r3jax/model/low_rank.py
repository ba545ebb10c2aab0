"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685): y = x W + (alpha / rank) (x A) B.

A is drawn like a kernel and B starts at zero, so that a policy starts as its base. Adapters are two
more parameters beside a kernel, see `layers.Projection`. This module says which projections have
them, and makes one policy of the base and the adapters: joined, as the modules read them, or merged
into the kernels.
"""

import dataclasses
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp

from r3jax import types
from r3jax.model import architecture
from r3jax.model import layers


def _kernel_sizes(
  config: architecture.LLMConfig,
) -> dict[str, tuple[int, int]]:
  """Returns the (inputs, outputs) of every projection of an expert."""
  width = config.hidden_size
  inner = config.intermediate_size
  heads = config.num_heads * config.head_dim
  kv_heads = config.num_kv_heads * config.head_dim
  return {
    "q": (width, heads),
    "k": (width, kv_heads),
    "v": (width, kv_heads),
    "o": (heads, width),
    "gate": (width, inner),
    "up": (width, inner),
    "down": (inner, width),
  }


# The projections that can have adapters.
PROJECTIONS = tuple(_kernel_sizes(architecture.LLMConfig()))


@dataclasses.dataclass(frozen=True)
class LoRA:
  """Which projections of every layer have adapters.

  Attributes:
    rank: of the updates; at 0 there are no adapters and the whole policy is trained.
    alpha: updates are scaled by alpha / rank.
    und: names of the projections of the und expert.
    gen: names of the projections of the gen expert.
  """

  rank: int = 0
  alpha: float = 1.0
  und: tuple[str, ...] = ()
  gen: tuple[str, ...] = ()

  def __post_init__(self):
    if self.rank < 0:
      raise ValueError(
        f"model.lora.rank must be at least 0 (0 trains the whole policy); got {self.rank}"
      )
    if self.alpha <= 0:
      raise ValueError(f"model.lora.alpha must be above 0; got {self.alpha}")
    # Named as the keys of the config, whose values these are.
    for expert in ("und", "gen"):
      names = tuple(getattr(self, expert))
      if not set(names) <= set(PROJECTIONS):
        raise ValueError(
          f"model.lora.{expert} must be a tuple of names among {list(PROJECTIONS)}; got {names}"
        )
      # A tuple also where a list was read from JSON, to be hashable.
      object.__setattr__(self, expert, names)
    if self.rank and not self.und + self.gen:
      raise ValueError(
        "model.lora.und or model.lora.gen must name a projection where model.lora.rank is above 0;"
        f" it is {self.rank}"
      )

  @property
  def scale(self) -> float:
    """Factor of the updates."""
    return self.alpha / self.rank if self.rank else 0.0

  def check(self, config: architecture.LLMConfig):
    """Checks that every kernel is large enough for the rank.

    Raises:
      ValueError: the rank exceeds the smaller side of a kernel that it updates; lists all.
    """
    sizes = _kernel_sizes(config)
    too_small = {}
    for name in self.und + self.gen:
      inputs, outputs = sizes[name]
      if self.rank > min(inputs, outputs):
        too_small[name] = f"{name} {inputs}x{outputs}"
    if too_small:
      raise ValueError(
        f"model.lora.rank ({self.rank}) must be at most the smaller side of every kernel that it"
        f" updates; not so for {', '.join(too_small.values())}"
      )


def join(base: types.Params | None, trained: types.Params) -> types.Params:
  """Returns the policy that the modules run: the base and what is trained beside it.

  Args:
    base: parameters that are not trained; None where all are.
    trained: the adapters, one expert, or all parameters. Where it is empty the policy is the base.
  """
  if base is None:
    return trained
  policy = flax.traverse_util.flatten_dict(base)
  policy |= flax.traverse_util.flatten_dict(trained)
  return flax.traverse_util.unflatten_dict(policy)


def adapters(policy: types.Params) -> types.Params:
  """Returns the adapters of a joined policy (or of a tree like it: shapes, shardings)."""
  flat = flax.traverse_util.flatten_dict(policy)
  trained = {
    path: leaf for path, leaf in flat.items() if path[-1] in layers.ADAPTERS
  }
  return flax.traverse_util.unflatten_dict(trained)


def merge(
  base: types.Params, trained: types.Params, scale: float
) -> types.Params:
  """Returns a policy without adapters that computes the same: W + scale A B in place of W.

  Args:
    base: parameters, jax arrays.
    trained: the adapters.
    scale: alpha / rank.

  Returns:
    The policy; merged kernels are in float32 or wider, and sharded as they were.
  """
  policy: dict[tuple, Any] = dict(flax.traverse_util.flatten_dict(base))
  updates: dict[tuple, Any] = dict(flax.traverse_util.flatten_dict(trained))
  for path in sorted({path[:-1] for path in updates}):
    kernel = policy[*path, "kernel"]
    # A program per kernel, so that the sum is sharded as the kernel is.
    a, b = (updates[*path, name] for name in layers.ADAPTERS)
    add = jax.jit(
      _add_update, static_argnames="scale", out_shardings=kernel.sharding
    )
    policy[*path, "kernel"] = add(kernel, a, b, scale=scale)
  return flax.traverse_util.unflatten_dict(policy)


def _add_update(
  kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float
) -> jax.Array:
  """Returns W + scale A B of all layers.

  Args:
    kernel: W, [L, inputs..., outputs...].
    a: [L, inputs..., rank].
    b: [L, rank, outputs...].
    scale: alpha / rank.
  """
  dtype = layers.at_least_float32(jnp.promote_types(kernel.dtype, a.dtype))

  # Over the layers; in full precision, because the sum replaces the kernel for good.
  @jax.vmap
  def product(a, b):
    highest = jax.lax.Precision.HIGHEST
    return jnp.tensordot(a, b, axes=1, precision=highest)

  update = product(a.astype(dtype), b.astype(dtype))
  return kernel.astype(dtype) + scale * update

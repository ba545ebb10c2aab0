"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685): `y = x W + (alpha / rank) (x A) B`.

A is drawn like a kernel and B starts at zero, so that a policy starts as its base. Adapters are two
more parameters of a kernel's `layers.Projection`. Here is which projections have them, and how the
base and the adapters become one policy: joined, as the modules want them, or merged.
"""

import dataclasses

import flax.traverse_util
import jax
import jax.numpy as jnp

from r3jax import types
from r3jax.model import architecture
from r3jax.model import layers


def _sides(config: architecture.LLMConfig) -> dict[str, tuple[int, int]]:
  """Returns the numbers of inputs and outputs of every projection of an expert."""
  width, inner = config.hidden_size, config.intermediate_size
  heads, kv_heads = (
    config.num_heads * config.head_dim,
    config.num_kv_heads * config.head_dim,
  )
  return {
    "q": (width, heads),
    "k": (width, kv_heads),
    "v": (width, kv_heads),
    "o": (heads, width),
    "gate": (width, inner),
    "up": (width, inner),
    "down": (inner, width),
  }


PROJECTIONS = tuple(_sides(architecture.LLMConfig()))  # that can have adapters


@dataclasses.dataclass(frozen=True)
class LoRA:
  """Which projections of every layer have adapters.

  Attributes:
    rank: of the updates; 0 is none: the whole policy is trained.
    alpha: updates are scaled by alpha / rank.
    und, gen: names of the projections, by expert.
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
    for expert in ("und", "gen"):
      names = getattr(self, expert)
      if not set(names) <= set(PROJECTIONS):
        raise ValueError(
          f"model.lora.{expert} must be a tuple of names among {list(PROJECTIONS)}; got {tuple(names)}"
        )
      # hashable, also when it was read from JSON
      object.__setattr__(self, expert, tuple(names))
    if self.rank and not self.und + self.gen:
      raise ValueError(
        f"model.lora.und or model.lora.gen must name a projection where model.lora.rank is above 0; it is {self.rank}"
      )

  @property
  def scale(self) -> float:
    """Factor of the updates."""
    return self.alpha / self.rank if self.rank else 0.0

  def check(self, config: architecture.LLMConfig):
    """Raises ValueError where the rank exceeds the smaller side of a kernel that it updates."""
    sides = _sides(config)
    too_small = {
      name: sides[name]
      for name in self.und + self.gen
      if self.rank > min(sides[name])
    }
    if too_small:
      listed = ", ".join(
        f"{name} {inputs}x{outputs}"
        for name, (inputs, outputs) in too_small.items()
      )
      raise ValueError(
        f"model.lora.rank ({self.rank}) must be at most the smaller side of every kernel that it updates;"
        f" not so for {listed}"
      )


def join(base: types.Params | None, trained: types.Params) -> types.Params:
  """Returns the policy that the modules run: the base with the adapters beside its kernels.

  Args:
    base: parameters that are not trained; None where all are.
    trained: the adapters, or all parameters. Without any the policy is the base.
  """
  if base is None:
    return trained
  flat = flax.traverse_util.flatten_dict
  return flax.traverse_util.unflatten_dict({**flat(base), **flat(trained)})


def adapters(policy: types.Params) -> types.Params:
  """Returns the adapters of a joined policy (or of a tree like it: shapes, shardings)."""
  flat = flax.traverse_util.flatten_dict(policy)
  return flax.traverse_util.unflatten_dict(
    {path: leaf for path, leaf in flat.items() if path[-1] in layers.ADAPTERS}
  )


def _sum(
  kernel: jax.Array, down: jax.Array, up: jax.Array, scale: float
) -> jax.Array:
  """Returns `W + scale A B` of all layers: [L, inputs..., outputs...], [L, inputs..., rank], [L, rank, outputs...]."""
  dtype = layers.at_least_float32(jnp.promote_types(kernel.dtype, down.dtype))
  product = lambda a, b: jnp.tensordot(
    a, b, axes=1, precision=jax.lax.Precision.HIGHEST
  )
  return kernel.astype(dtype) + scale * jax.vmap(product)(
    down.astype(dtype), up.astype(dtype)
  )


def merge(
  base: types.Params, trained: types.Params, scale: float
) -> types.Params:
  """Returns a policy without adapters that computes the same: `W + scale A B` in place of every W that has them.

  Args:
    base: parameters, jax arrays.
    trained: the adapters.
    scale: alpha / rank.

  Returns:
    The policy; merged kernels are in float32 or wider, and sharded as they were.
  """
  policy, updates = (
    flax.traverse_util.flatten_dict(tree) for tree in (base, trained)
  )
  for path in sorted({path[:-1] for path in updates}):
    kernel = policy[*path, "kernel"]
    add = jax.jit(_sum, static_argnums=3, out_shardings=kernel.sharding)
    policy[*path, "kernel"] = add(
      kernel, *(updates[*path, name] for name in layers.ADAPTERS), scale
    )
  return flax.traverse_util.unflatten_dict(policy)

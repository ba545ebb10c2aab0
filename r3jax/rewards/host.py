"""Calls to the host from inside the mapped step: rewards and text parsing.

Inside the step only `data` is mapped by hand. A nested, fully mapped region makes every device of
a replica handle its own rows, so each image is scored once, on the host that holds it.
"""

from collections.abc import Callable

import jax
from jax.experimental import io_callback
import jax.numpy as jnp
import numpy as np

from r3jax import types
from r3jax.rewards import base
from r3jax.rewards import format as format_lib

_INNER = ("fsdp", "tensor")

# images uint8 [n, H, W, 3], rows of targets -> (value [n], valid [n], parts {name: [n]})
HostReward = Callable[[np.ndarray, object], base.Score]


def _padded(tree, multiple: int):
  """Repeats the last row until the number of rows is a multiple."""
  def pad(x):
    missing = -x.shape[0] % multiple
    return jnp.concatenate([x, jnp.repeat(x[-1:], missing, axis=0)]) if missing else x
  return jax.tree.map(pad, tree)


def reward_from_host(reward: HostReward, parts: tuple[str, ...], mesh: jax.sharding.Mesh):
  """Makes a reward of the compiled step from a Python function.

  Args:
    reward: scores numpy images; called once per device with that device's rows. It must not wait for
      computations on the mesh's own devices, which wait for it.
    parts: names of the parts that it returns.
    mesh: the step's mesh.

  Returns:
    A function (images [B, H, W, 3], target rows) -> Score for use inside the step.
  """
  shards = mesh.shape["fsdp"] * mesh.shape["tensor"]

  def call(images, target):
    rows = images.shape[0]
    like = base.Score(
        jax.ShapeDtypeStruct((rows,), jnp.float32),
        jax.ShapeDtypeStruct((rows,), jnp.bool_),
        {name: jax.ShapeDtypeStruct((rows,), jnp.float32) for name in parts},
    )
    return io_callback(reward, like, images, target)

  spec = jax.sharding.PartitionSpec(_INNER)
  scored = jax.shard_map(call, in_specs=spec, out_specs=spec, axis_names=set(_INNER), check_vma=False)

  def score(images: types.Images, target) -> base.Score:
    rows = images.shape[0]
    # Else the sharding of the rows spreads back into the model, where the partitioner aborts.
    images = jax.lax.with_sharding_constraint(images, jax.sharding.PartitionSpec())
    found = scored(*_padded((images, target), shards))
    return jax.tree.map(lambda x: x[:rows], found)

  return score


def parse_on_host(tokenizer, instruction_capacity: int):
  """Makes the step's parser from the real tokenizer, for vocabularies without a token parser.

  Args:
    tokenizer: a `sequence.tokenizer.TextTokenizer`.
    instruction_capacity: slots of an instruction.

  Returns:
    A function (ids [B, T], lengths [B], stage) -> Parsed for use inside the step.
  """

  def parse(ids: types.TokenIds, lengths: types.Lengths, stage: str) -> format_lib.Parsed:
    rows = ids.shape[0]
    like = format_lib.Parsed(
        format=jax.ShapeDtypeStruct((rows,), jnp.float32),
        instruction=jax.ShapeDtypeStruct((rows, instruction_capacity), jnp.int32),
        instruction_length=jax.ShapeDtypeStruct((rows,), jnp.int32),
        stop=jax.ShapeDtypeStruct((rows,), jnp.bool_),
        truncated=jax.ShapeDtypeStruct((rows,), jnp.bool_),
    )
    host = lambda i, n: format_lib.parse_strings(i, n, stage, tokenizer, instruction_capacity)
    spec = jax.sharding.PartitionSpec()
    call = lambda i, n: jax.pure_callback(host, like, i, n)
    mapped = jax.shard_map(call, in_specs=spec, out_specs=spec, axis_names=set(_INNER), check_vma=False)
    return mapped(ids, lengths)

  return parse

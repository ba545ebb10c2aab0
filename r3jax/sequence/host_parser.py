"""The parser of thoughts as a call to the host, for vocabularies without a token parser."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from r3jax import types
from r3jax.parallel import host_calls
from r3jax.sequence import thoughts
from r3jax.sequence import tokenization


def parse_on_host(
  tokenizer: tokenization.TextTokenizer,
  instruction_capacity: int,
  mesh: jax.sharding.Mesh,
):
  """Returns the step's parser, which decodes the ids and parses their strings on the host.

  Args:
    tokenizer: decodes the ids.
    instruction_capacity: slots of an instruction.
    mesh: the mesh of the step.

  Returns:
    A function (ids [B, T], lengths [B], stage) -> Parsed for use inside the step.
  """

  def parse_strings(ids, lengths, stage: str) -> np.ndarray:
    """Returns int32 [B, slots + 4]: the instruction's slots and four numbers."""
    parsed = thoughts.parse_strings(
      ids, lengths, stage, tokenizer, instruction_capacity
    )
    numbers = [
      parsed.instruction_length,
      parsed.stop,
      parsed.truncated,
      parsed.format,
    ]
    columns = [parsed.instruction, np.stack(numbers, axis=1)]
    return np.concatenate(columns, axis=1).astype(np.int32)

  def parse(
    ids: types.TokenIds, lengths: types.Lengths, stage: str
  ) -> thoughts.Parsed:
    # One array holds all results: for TPUs, JAX 0.10 gives all results of a callback the sharding
    # of the first one's rank.
    like = jax.ShapeDtypeStruct(
      (ids.shape[0], instruction_capacity + 4), jnp.int32
    )
    call = host_calls.call_host(
      functools.partial(parse_strings, stage=stage), like, mesh, pure=True
    )
    # Every device parses all rows: they are few, and the results are needed on all of them.
    replicated = jax.sharding.PartitionSpec()
    mapped = jax.shard_map(
      call,
      in_specs=replicated,
      out_specs=replicated,
      axis_names=set(host_calls.INNER_AXES),
      check_vma=False,
    )
    columns = mapped(ids, lengths)
    length, stop, truncated, has_format = jnp.moveaxis(
      columns[:, instruction_capacity:], 1, 0
    )
    return thoughts.Parsed(
      format=has_format.astype(jnp.float32),
      instruction=columns[:, :instruction_capacity],
      instruction_length=length,
      stop=stop.astype(bool),
      truncated=truncated.astype(bool),
    )

  return parse

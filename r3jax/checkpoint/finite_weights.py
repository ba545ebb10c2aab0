"""Checks that weights are finite, on the devices that hold them."""

import collections
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from r3jax import types

_MOST_LEAVES = 5  # in a message
# Numbers that the host looks at in one go.
_BLOCK = 1 << 20


@jax.jit
def _counts(arrays: Sequence[jax.Array]) -> list[jax.Array]:
  """Returns how many numbers of every array are NaN or infinite, [] int32 each."""
  return [jnp.sum(~jnp.isfinite(x), dtype=jnp.int32) for x in arrays]


def _count_on_host(array: jax.Array) -> int:
  """Returns how many numbers of an array in the host's memory are NaN or infinite.

  Block by block: XLA's CPU program would hold a mask of every array at once.
  """
  numbers = np.asarray(array).reshape(-1)
  count = 0
  for start in range(0, numbers.size, _BLOCK):
    block = numbers[start : start + _BLOCK]
    count += block.size - int(np.count_nonzero(np.isfinite(block)))
  return count


def _on(
  device: jax.Device, arrays: Sequence[jax.Array]
) -> Sequence[jax.Array | int]:
  """Starts to count in arrays of one device, under whatever mesh the caller has set."""
  if device.platform == "cpu":
    return [_count_on_host(array) for array in arrays]
  with jax.set_mesh(jax.sharding.Mesh(np.array([device]), ("device",))):
    return _counts(arrays)


def num_nonfinite(params: types.Params) -> dict[str, int]:
  """Returns, by path, how many numbers of every leaf are NaN or infinite; only those above 0.

  Every process counts in the parts of the leaves that its own devices hold, so that none waits for
  another. Nothing is copied to the host but the counts.

  Args:
    params: tree of arrays.
  """
  # A device -> paths and parts of leaves; a part that several devices hold is counted once.
  names = collections.defaultdict(list)
  parts = collections.defaultdict(list)
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = "/".join(str(key.key) for key in path)
    distinct = {str(shard.index): shard for shard in leaf.addressable_shards}
    for shard in distinct.values():
      names[shard.device].append(name)
      parts[shard.device].append(shard.data)
  # All devices count at the same time.
  counts = {device: _on(device, arrays) for device, arrays in parts.items()}
  total: dict[str, int] = collections.Counter()
  for device, of_parts in counts.items():
    for name, count in zip(names[device], of_parts, strict=True):
      total[name] += int(np.asarray(count))
  return {name: count for name, count in total.items() if count}


def check(params: types.Params, source: object) -> None:
  """Checks that all numbers of a model are finite.

  Args:
    params: tree of arrays on devices.
    source: where they were read, for the message.

  Raises:
    ValueError: some are not; the message names their leaves.
  """
  counts = num_nonfinite(params)
  if counts:
    raise ValueError(
      f"weights must be finite; those of {source} are not in {_listed(counts)}. Take another copy "
      "of the model, or an earlier checkpoint"
    )


def _listed(counts: Mapping[str, int]) -> str:
  """Returns leaves with their counts, for a message of one line."""
  leaves = [f"{name} ({count})" for name, count in counts.items()]
  num_more = len(leaves) - _MOST_LEAVES
  more = f" and {num_more} more leaves" if num_more > 0 else ""
  return ", ".join(leaves[:_MOST_LEAVES]) + more

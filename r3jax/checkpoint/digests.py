"""Digests of arrays that do not depend on how the arrays are sharded.

Every 32-bit word w of an array, at the row-major position i of its element, is mixed with its
position, and the results are added modulo 2^32:

  h(w, i) = mix(w XOR key(i)),  key(i) = i * ODD,
  digest  = (sum of h(w, i), sum of h(w, i) * (key(i) OR 1)).

Sums need no order, so that shards, chunks, devices and hosts add their parts in any way and get the
same 64 bits. A digest protects against accidents (a flipped bit, a cut file, the numbers of another
step), not against intent: a single changed word always changes it, other damage goes unseen with a
probability of about 2^-64.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from r3jax.parallel import multihost

PyTree = Any

_WORD = 1 << 32
_ODD = 0x9E3779B1  # 2^32 over the golden ratio: neighbours get keys far apart
_BLOCK = (
  1 << 16
)  # words that are mixed at a time, so that they stay in the cache
# Exponents of values that are not finite, where a word holds one value.
_EXPONENTS = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00}


@dataclasses.dataclass(frozen=True)
class Leaf:
  """What must be known of an array to recognise it.

  Attributes:
    dtype: Name of its dtype.
    shape: Its shape.
    digest: 16 hex digits.
    is_finite: Whether it has neither NaN nor infinity.
  """

  dtype: str
  shape: tuple[int, ...]
  digest: str
  is_finite: bool


def of_tree(tree: PyTree) -> dict[str, Leaf]:
  """Returns the digest of every array of a tree, by its path, joined by ".".

  On accelerators the devices compute them, each from its shards, in about the time that they need
  to read the arrays once. On CPUs the host reads the devices' memory. With several processes all
  must call it at the same point.
  """
  arrays = {
    leaf_name(path): leaf
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
  }
  are_near = _are_on_cpus(arrays.values())
  sums = _on_hosts(arrays) if are_near else multihost.fetch(on_devices(arrays))
  return {
    name: _leaf(arrays[name].dtype, arrays[name].shape, sums[name])
    for name in arrays
  }


def of_chunks(
  dtype: np.dtype,
  shape: Sequence[int],
  chunks: Iterable[tuple[np.ndarray, Sequence[int]]],
) -> Leaf:
  """Returns the digest of an array from its chunks on the host.

  Args:
    dtype: Dtype of the array.
    shape: Shape of the array.
    chunks: (chunk, position of its first element), which cover the array once; they are taken one
      at a time.
  """
  total = np.zeros(3, np.uint64)
  for chunk, start in chunks:
    total += of_chunk(chunk, start, shape)
  return _leaf(dtype, shape, total)


def leaf_name(path: Sequence[Any]) -> str:
  """Returns the name that Orbax stores a leaf of a tree by: its keys, joined by "."."""
  names = []
  for key in path:
    for attribute in ("key", "name", "idx"):
      if hasattr(key, attribute):
        names.append(str(getattr(key, attribute)))
        break
  return ".".join(names)


def _leaf(
  dtype: np.dtype, shape: Sequence[int], sums: Sequence[int] | np.ndarray
) -> Leaf:
  """Returns a digest from (sum, weighted sum, number of values that are not finite)."""
  first, second, num_bad = (int(number) for number in sums)
  return Leaf(
    dtype=np.dtype(dtype).name,
    shape=tuple(shape),
    digest=f"{first % _WORD:08x}{second % _WORD:08x}",
    is_finite=num_bad == 0,
  )


def _are_on_cpus(arrays: Any) -> bool:
  """Returns whether all arrays are in memory that the host can read without a copy."""
  for array in arrays:
    if isinstance(array, jax.Array):
      devices = array.sharding.device_set
      if any(device.platform != "cpu" for device in devices):
        return False
  return True


def _on_hosts(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Returns the sums of every array; each process adds its shards."""
  sums = {}
  for name, array in arrays.items():
    total = np.zeros(3, np.uint64)
    for chunk, start in _own_chunks(array):
      total += of_chunk(chunk, start, array.shape)
    sums[name] = total
  if jax.process_count() == 1:
    return sums
  # Not a collective of JAX: that would compile a program.
  mine = json.dumps({name: total.tolist() for name, total in sums.items()})
  theirs = [json.loads(text) for text in multihost.exchange(mine)]
  return {
    name: np.sum([sums_of_one[name] for sums_of_one in theirs], axis=0)
    for name in sums
  }


def _own_chunks(
  array: jax.Array | np.ndarray,
) -> Iterator[tuple[np.ndarray, Sequence[int]]]:
  """Yields what this process adds of an array: (chunk, position of its first element)."""
  if not isinstance(array, jax.Array):
    # Every process has all of it, in a dtype that JAX may not have.
    if jax.process_index() == 0:
      yield array, (0,) * array.ndim
    return
  for shard in array.addressable_shards:
    if shard.replica_id == 0:
      start = [part.indices(size)[0] for part, size in _spans(shard, array)]
      yield np.asarray(shard.data), start


def _spans(shard: Any, array: Any) -> Any:
  """Yields the slice of a shard and the size of the array, for every axis."""
  return zip(shard.index, array.shape, strict=True)


# --- One formula, on the host and on devices ----------------------------------------------------


def _mix(words: Any) -> Any:
  """Returns words [..] uint32 with every bit spread over all; one to one (MurmurHash3's end)."""
  words = words ^ (words >> 16)
  words = words * np.uint32(0x85EBCA6B)
  words = words ^ (words >> 13)
  words = words * np.uint32(0xC2B2AE35)
  return words ^ (words >> 16)


def _strides(shape: Sequence[int]) -> list[int]:
  """Returns how far apart neighbours of every axis are, in elements, row-major."""
  return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


def _words_per_element(dtype: np.dtype) -> int:
  return max(1, np.dtype(dtype).itemsize // 4)


def of_chunk(
  chunk: np.ndarray, start: Sequence[int], shape: Sequence[int]
) -> np.ndarray:
  """Returns the part of a digest that a piece of an array adds.

  Args:
    chunk: Piece of the array, of a dtype of 1, 2, 4 or 8 bytes.
    start: Position of the piece's first element in the array, one number an axis.
    shape: Shape of the array.

  Returns:
    (sum, weighted sum, number of values that are not finite) [3] uint64; sums of parts count modulo
    2^32.
  """
  num_bad = 0
  exponent = _EXPONENTS.get(chunk.dtype.name)
  if exponent is None and jnp.issubdtype(chunk.dtype, jnp.inexact):
    num_bad = chunk.size - int(np.count_nonzero(np.isfinite(chunk)))
  per_element = _words_per_element(chunk.dtype)
  words = _words_on_host(chunk)
  keys = _row_keys(chunk.shape, start, shape, per_element)
  # Along the last axis words are neighbours.
  columns = np.arange(words.shape[1], dtype=np.uint32) * np.uint32(_ODD)
  rows_at_once = max(1, _BLOCK // max(1, words.shape[1]))
  first = 0
  second = 0
  for row in range(0, words.shape[0], rows_at_once):
    rows = slice(row, row + rows_at_once)
    if exponent is not None:
      exponents = words[rows] & np.uint32(exponent)
      num_bad += int(np.count_nonzero(exponents == exponent))
    key = keys[rows, None] + columns
    mixed = _mix(words[rows] ^ key)
    first += int(mixed.sum(dtype=np.uint64))
    mixed *= key | np.uint32(1)
    second += int(mixed.sum(dtype=np.uint64))
  return np.array([first % _WORD, second % _WORD, num_bad], np.uint64)


def _words_on_host(chunk: np.ndarray) -> np.ndarray:
  """Returns the words of a chunk, [rows, words of a row]."""
  last = chunk.shape[-1] if chunk.ndim else 1
  rows = np.ascontiguousarray(chunk).reshape(-1, max(1, last))
  itemsize = chunk.dtype.itemsize
  if itemsize >= 4:
    return rows.view(np.uint32)
  return rows.view(f"u{itemsize}").astype(np.uint32)


def _row_keys(
  chunk_shape: Sequence[int],
  start: Sequence[int],
  shape: Sequence[int],
  per_element: int,
) -> np.ndarray:
  """Returns the key of the first word of every row of a chunk, [rows] uint32."""
  keys = np.zeros((1,), np.uint32)
  strides = _strides(shape)
  for axis, size in enumerate(chunk_shape):
    step = strides[axis] * per_element * _ODD % _WORD
    first = np.uint32(start[axis] * step % _WORD)
    if axis == len(chunk_shape) - 1:
      return keys + first
    positions = np.arange(size, dtype=np.uint32) * np.uint32(step) + first
    keys = (keys[:, None] + positions).reshape(-1)
  return keys


@jax.jit
def on_devices(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """Returns what `of_chunk` gives for whole arrays, [3] uint32 each, computed where shards are.

  One program for all, so that JAX's cache of compiled programs keeps it between starts.
  """
  return {name: _on_device(array) for name, array in arrays.items()}


def _on_device(array: jax.Array) -> jax.Array:
  """Returns what `of_chunk` gives for a whole array, [3] uint32."""
  num_bad = jnp.zeros((), jnp.uint32)
  if jnp.issubdtype(array.dtype, jnp.inexact):
    num_bad = jnp.sum(~jnp.isfinite(array), dtype=jnp.uint32)
  itemsize = array.dtype.itemsize
  per_element = _words_per_element(array.dtype)
  if array.dtype == jnp.bool_:
    words = array.astype(jnp.uint32)
  elif itemsize >= 4:
    words = jax.lax.bitcast_convert_type(array, jnp.uint32)
  else:
    narrow = jax.lax.bitcast_convert_type(array, f"uint{8 * itemsize}")
    words = narrow.astype(jnp.uint32)
  words = words.reshape(*array.shape, per_element)
  strides = [*(n * per_element for n in _strides(array.shape)), 1]
  keys = jnp.zeros(words.shape, jnp.uint32)
  for axis, stride in enumerate(strides):
    positions = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    keys += positions * np.uint32(stride * _ODD % _WORD)
  mixed = _mix(words ^ keys)
  first = jnp.sum(mixed, dtype=jnp.uint32)
  second = jnp.sum(mixed * (keys | 1), dtype=jnp.uint32)
  return jnp.stack([first, second, num_bad])

"""Tests of checkpoint/digests.py."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from r3jax.checkpoint import digests

DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16, np.int32, np.uint8, bool)


def _array(dtype) -> np.ndarray:
  values = np.random.default_rng(0).standard_normal((5, 6, 7)) * 3
  return values.astype(dtype)


def _on_device(array) -> list[int]:
  """Returns the sums of an array as accelerators compute them."""
  return digests.on_devices({"x": jnp.asarray(array)})["x"].tolist()


def _digest(array: np.ndarray) -> digests.Leaf:
  return digests.of_tree({"x": jnp.asarray(array)})["x"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_host_devices_and_chunks_agree(dtype):
  array = _array(dtype)
  start = (0, 0, 0)
  whole = digests.of_chunks(array.dtype, array.shape, [(array, start)])
  chunks = []
  for row in (3, 0):
    for column in (4, 0):
      rows = slice(row, row + 3 if row == 0 else None)
      columns = slice(column, column + 4 if column == 0 else None)
      chunks.append((array[rows, :, columns], (row, 0, column)))
  assert digests.of_chunks(array.dtype, array.shape, chunks) == whole
  assert _digest(array) == whole
  first, second, num_bad = _on_device(array)
  assert f"{first:08x}{second:08x}" == whole.digest
  assert num_bad == 0


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0)])
def test_small_shapes(shape):
  array = np.ones(shape, np.float32)
  on_device = _on_device(array)
  assert digests.of_chunk(array, (0,) * len(shape), shape).tolist() == on_device


def test_any_sharding_has_the_same_digest():
  array = np.random.default_rng(1).standard_normal((8, 12)).astype(np.float32)
  mesh = jax.make_mesh((4, 2), ("a", "b"))
  expected = _digest(array)
  for spec in (jax.P(), jax.P("a"), jax.P("b", "a"), jax.P(("a", "b"))):
    sharded = jax.device_put(array, jax.NamedSharding(mesh, spec))
    assert digests.of_tree({"x": sharded})["x"] == expected
    sums = _on_device(sharded)
    assert f"{sums[0]:08x}{sums[1]:08x}" == expected.digest


def test_every_bit_counts():
  array = np.arange(64, dtype=np.float32)
  seen = {_digest(array).digest}
  for bit in range(0, 64 * 32, 7):
    changed = array.copy().view(np.uint32)
    changed[bit // 32] ^= np.uint32(1 << (bit % 32))
    seen.add(_digest(changed.view(np.float32)).digest)
  assert len(seen) == 1 + len(range(0, 64 * 32, 7))


def test_order_and_pairs_of_changes_count():
  array = np.arange(1.0, 9.0, dtype=np.float32)
  changes = [array, array[::-1], np.roll(array, 1)]
  for first in range(8):
    for second in range(first):
      signs = np.ones(8, np.float32)
      signs[[first, second]] = -1
      changes.append(array * signs)
  assert len({_digest(x).digest for x in changes}) == len(changes)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_what_is_not_finite_is_noticed(value, dtype):
  array = _array(dtype)
  assert _digest(array).is_finite
  array[1, 2, 3] = value
  assert not _digest(array).is_finite
  assert _on_device(array)[2] == 1

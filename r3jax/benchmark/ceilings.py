"""Measures what the devices can do: operations of a matrix product, and bytes of a copy."""

from collections.abc import Callable
import dataclasses
import time

import jax
import jax.numpy as jnp

from r3jax import types

# Sides of the squares that are multiplied, and bytes of the array that is copied: large enough to
# hide what starting a program costs, small enough for a fraction of a second.
_CPU_SIDE = 2048
_ACCELERATOR_SIDE = 8192
_CPU_BYTES = 2**28
_ACCELERATOR_BYTES = 2**31
_REPEATS = 5


@dataclasses.dataclass(frozen=True)
class Ceilings:
  """The most that all devices of a mesh did together.

  Attributes:
    flops: operations per second of a matrix product in the compute dtype.
    bandwidth: bytes per second of a copy, read and written.
  """

  flops: float
  bandwidth: float


def best(first: Ceilings, second: Ceilings) -> Ceilings:
  """Returns the higher of two measurements: a machine can do what it did once."""
  return Ceilings(
    max(first.flops, second.flops), max(first.bandwidth, second.bandwidth)
  )


def measure(mesh: jax.sharding.Mesh, dtype: types.DType) -> Ceilings:
  """Measures the devices of a mesh, all at the same time.

  Args:
    mesh: its devices are measured.
    dtype: of the factors; sums are in float32 or wider.
  """
  is_cpu = mesh.devices.flat[0].platform == "cpu"
  side = _CPU_SIDE if is_cpu else _ACCELERATOR_SIDE
  wide = jnp.promote_types(dtype, jnp.float32)

  def product(x: jax.Array) -> jax.Array:
    return jnp.matmul(x, x, preferred_element_type=wide)

  seconds = _seconds(mesh, product, (side, side), dtype)
  flops = mesh.size * 2 * side**3 / seconds

  num_bytes = _CPU_BYTES if is_cpu else _ACCELERATOR_BYTES
  shape = (num_bytes // jnp.dtype(jnp.float32).itemsize,)

  # Signs change, because a program that returns its argument copies nothing.
  seconds = _seconds(mesh, jnp.negative, shape, jnp.dtype(jnp.float32))
  return Ceilings(flops, mesh.size * 2 * num_bytes / seconds)


def _seconds(
  mesh: jax.sharding.Mesh,
  function: Callable[[jax.Array], jax.Array],
  shape: tuple[int, ...],
  dtype: types.DType,
) -> float:
  """Returns the shortest time of a function of one array, run on every device at once."""
  everywhere = jax.sharding.PartitionSpec(mesh.axis_names)
  # Every device has an array of its own.
  whole_shape = (mesh.size * shape[0], *shape[1:])
  sharding = jax.sharding.NamedSharding(mesh, everywhere)
  array = jax.jit(
    lambda: jnp.ones(whole_shape, dtype), out_shardings=sharding
  )()
  mapped = jax.shard_map(
    function, mesh=mesh, in_specs=everywhere, out_specs=everywhere
  )
  program = jax.jit(mapped)
  jax.block_until_ready(program(array))
  seconds = []
  for _ in range(_REPEATS):
    start = time.monotonic()
    jax.block_until_ready(program(array))
    seconds.append(time.monotonic() - start)
  return min(seconds)

"""Calls Python functions on the host from inside the mapped step.

Inside the step only `data` is mapped by hand. A nested, fully mapped region lets every device of a
replica handle its own rows, so that each row is handled once, on the host that holds it.
"""

from collections.abc import Callable
import functools

import jax
from jax.experimental import buffer_callback
from jax.experimental import io_callback
import jax.numpy as jnp
import numpy as np

# The axes of the mesh that the compiler handles inside the step; see `parallel.meshes`.
INNER_AXES = ("fsdp", "tensor")


def call_host(
  function: Callable, like, mesh: jax.sharding.Mesh, pure: bool
) -> Callable:
  """Makes a numpy function callable in the graph, once per device.

  JAX's own callbacks copy large arguments with the threads that run the CPU's devices. When all of
  those wait for a callback, nobody copies, and the program hangs. On CPUs the function therefore
  gets XLA's own buffers, copied first: XLA uses them again when the function returns.

  Args:
    function: arrays -> arrays.
    like: shapes and dtypes of its results, a pytree of `jax.ShapeDtypeStruct`.
    mesh: the mesh of the step, whose platform decides how the call is made.
    pure: whether calls may be left out or repeated.
  """
  if mesh.devices.flat[0].platform != "cpu":
    callback = jax.pure_callback if pure else io_callback
    return functools.partial(callback, function, like)

  def copied(buffer) -> np.ndarray:
    return np.asarray(buffer).copy()

  def write(buffer, result) -> None:
    np.copyto(np.asarray(buffer), result)

  def fill(context, outputs, *arguments) -> None:
    del context
    results = function(*jax.tree.map(copied, arguments))
    jax.tree.map(write, outputs, results)

  return buffer_callback.buffer_callback(fill, like, has_side_effect=not pure)


def map_rows(call: Callable, mesh: jax.sharding.Mesh) -> Callable:
  """Splits rows over the devices of a replica, each of which makes its own call.

  Args:
    call: (pytree of arrays [rows of a device, ...], ...) -> pytree of such arrays.
    mesh: the mesh of the step.

  Returns:
    The function on all rows of a replica. Their number may be odd: the last row is repeated until
    the rows split evenly, and the results of the repeated rows are cut off.
  """
  shards = mesh.shape["fsdp"] * mesh.shape["tensor"]
  rows_spec = jax.sharding.PartitionSpec(INNER_AXES)
  mapped = jax.shard_map(
    call,
    in_specs=rows_spec,
    out_specs=rows_spec,
    axis_names=set(INNER_AXES),
    check_vma=False,
  )

  def call_padded(*arguments):
    rows = jax.tree.leaves(arguments)[0].shape[0]
    results = mapped(*_padded(arguments, shards))
    return jax.tree.map(lambda x: x[:rows], results)

  return call_padded


def _padded(tree, multiple: int):
  """Repeats the last row of every array until the number of rows is a multiple."""

  def pad(x: jax.Array) -> jax.Array:
    missing = -x.shape[0] % multiple
    if not missing:
      return x
    return jnp.concatenate([x, jnp.repeat(x[-1:], missing, axis=0)])

  return jax.tree.map(pad, tree)

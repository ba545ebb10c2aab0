"""The device mesh: data replicas, parameter shards, tensor shards."""

from collections.abc import Sequence
import os

import jax
import numpy as np

AXES = ("data", "fsdp", "tensor")


def use_all_cores(rows: int):
  """Makes CPU cores into devices, as many as split `rows` evenly; call it before JAX starts.

  Small operations leave the threads of one device idle. Nothing changes where there is an
  accelerator, or where the user has set the number of CPU devices.

  Args:
    rows: of a batch.
  """
  xla_flags = os.environ.get("XLA_FLAGS", "")
  if "JAX_NUM_CPU_DEVICES" in os.environ:
    return
  if "host_platform_device_count" in xla_flags:
    return
  num_cores = os.cpu_count() or 1
  divisors = [n for n in range(1, num_cores + 1) if rows % n == 0]
  jax.config.update("jax_num_cpu_devices", max(divisors))


def make_mesh(data: int, fsdp: int, tensor: int) -> jax.sharding.Mesh:
  """Returns a mesh over all devices, see `make_mesh_on`."""
  return make_mesh_on(jax.devices(), data, fsdp, tensor)


def make_mesh_on(
  devices: Sequence[jax.Device],  # pyright: ignore[reportInvalidTypeForm]
  data: int,
  fsdp: int,
  tensor: int,
) -> jax.sharding.Mesh:
  """Returns a mesh over the given devices.

  Args:
    devices: the mesh uses all of them.
    data: replicas that the step is mapped over; -1 takes the devices that the others leave.
    fsdp: shards of every parameter.
    tensor: shards of heads and MLP.

  Raises:
    ValueError: a size is below 1, or the product is not the number of devices.
  """
  num_devices = len(devices)
  if fsdp < 1 or tensor < 1 or (data < 1 and data != -1):
    raise ValueError(
      f"mesh sizes must be at least 1 (data may be -1); got {data} * {fsdp} * {tensor}"
    )
  if data == -1:
    data = num_devices // (fsdp * tensor)
  if data * fsdp * tensor != num_devices:
    raise ValueError(
      f"mesh data * fsdp * tensor must be the number of devices ({num_devices});"
      f" got {data} * {fsdp} * {tensor}"
    )
  grid = np.asarray(devices).reshape(data, fsdp, tensor)
  axis_types = (jax.sharding.AxisType.Auto,) * len(AXES)
  return jax.sharding.Mesh(grid, AXES, axis_types=axis_types)

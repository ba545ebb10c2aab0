"""Reports the versions, devices and memory of a run."""

import ctypes
import importlib.metadata
import pathlib
import re
import resource
import sys

import jax

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")


def versions() -> dict[str, str]:
  """Returns the versions of the libraries that compute, and the kind and number of devices."""
  versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
  versions["device"] = jax.devices()[0].device_kind
  versions["devices"] = str(jax.device_count())
  return versions


def peak_memory() -> int:
  """Returns the peak memory of this process in bytes."""
  # On Linux `ru_maxrss` is no substitute: a process inherits that of its parent.
  status = pathlib.Path("/proc/self/status")
  if status.exists():
    peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
    if peak:
      return int(peak[1]) * 1024
  bytes_per_unit = 1 if sys.platform == "darwin" else 1024
  usage = resource.getrusage(resource.RUSAGE_SELF)
  return usage.ru_maxrss * bytes_per_unit


def return_freed_memory() -> None:
  """Returns memory that the compiler has freed to the system; glibc would keep 2 GiB of it."""
  # Other C libraries than glibc do not have the function.
  trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
  if trim:
    trim(0)

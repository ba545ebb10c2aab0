"""What a run found itself on: versions, devices, memory."""

import ctypes
import importlib.metadata
import pathlib
import re
import resource
import sys

import jax

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")


def versions() -> dict[str, str]:
  """Returns the versions of what matters, and the devices."""
  found = {name: importlib.metadata.version(name) for name in _PACKAGES}
  return found | {
    "device": jax.devices()[0].device_kind,
    "devices": str(jax.device_count()),
  }


def peak_memory() -> int:
  """Returns the most bytes of memory that this process has held.

  Not `ru_maxrss` where there is another figure: on Linux a process starts with that of its parent.
  """
  status = pathlib.Path("/proc/self/status")
  found = (
    re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
    if status.exists()
    else None
  )
  if found:
    return int(found[1]) * 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
    1 if sys.platform == "darwin" else 1024
  )


def return_freed_memory() -> None:
  """Gives the system back what the compiler has freed: glibc would keep 2 GiB of it."""
  # other C libraries have none
  trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
  if trim:
    trim(0)

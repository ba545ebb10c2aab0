"""Reports the versions, devices, memory and command of a run."""

import ctypes
import datetime
import functools
import importlib.metadata
import os
import pathlib
import platform
import re
import resource
import shlex
import subprocess
import sys

import jax

_GIT_SECONDS = 5.0  # git waits for a disk, not for long
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")


def versions() -> dict[str, str]:
  """Returns the versions of the libraries that compute, and the kind and number of devices."""
  versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
  versions["device"] = jax.devices()[0].device_kind
  versions["devices"] = str(jax.device_count())
  return versions


def start() -> dict[str, str]:
  """Returns by what command, when, where and from which source this process was started."""
  device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
  host = f"{platform.node()}, {os.cpu_count()} CPU cores"
  program, *arguments = sys.argv
  now = datetime.datetime.now(datetime.UTC)
  return {
    "command": f"{program} {shlex.join(arguments)}".strip(),
    "commit": _commit(),
    "date": now.strftime("%Y-%m-%d %H:%M UTC"),
    "machine": f"{host}; {device}; processes: {jax.process_count()}",
  }


@functools.cache
def _commit() -> str:
  """Returns the commit of this package's checkout, "+" behind it if files have changed.

  It is computed once per process: the source may be edited later, and is not imported again.
  It is "" where the package is not in a checkout of its own, or git cannot say.
  """
  root = pathlib.Path(__file__).parents[2]
  if not (root / ".git").exists():
    return ""
  command = ["git", "-C", str(root), "describe", "--always", "--dirty=+"]
  try:
    result = subprocess.run(
      command,
      capture_output=True,
      text=True,
      check=True,
      timeout=_GIT_SECONDS,
    )
  except (OSError, subprocess.SubprocessError):
    return ""
  return result.stdout.strip()


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

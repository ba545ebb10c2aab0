"""Compiles a program and times its runs: wall-clock and CPU seconds, and memory."""

from collections.abc import Callable, Mapping
import dataclasses
import pathlib
import statistics
import time
from typing import Any

import jax

from r3jax.run import machine

# Sets the kernel's high-water mark of a process back to what it holds now (Linux).
_CLEAR_PEAK = pathlib.Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


@dataclasses.dataclass(frozen=True)
class Measurement:
  """The timed runs of one program.

  Attributes:
    name: of the program.
    seconds: wall-clock seconds of every timed run.
    cpu_seconds: CPU seconds of all threads of this process, of every timed run.
    compile_seconds: tracing and compiling; less where JAX's compilation cache holds the program.
    compiled_bytes: what the compiler reports of one device, by kind: "arguments", "results",
      "aliased" (results in the place of arguments), "temporaries"; empty where it reports nothing.
    peak_bytes: most memory that the process held during the runs, arrays of other programs
      included; of an accelerator, the most that its fullest device has held so far.
  """

  name: str
  seconds: tuple[float, ...]
  cpu_seconds: tuple[float, ...]
  compile_seconds: float
  compiled_bytes: Mapping[str, int]
  peak_bytes: int

  @property
  def median_seconds(self) -> float:
    """Median of the wall-clock seconds."""
    return statistics.median(self.seconds)

  @property
  def median_cpu_seconds(self) -> float:
    """Median of the CPU seconds."""
    return statistics.median(self.cpu_seconds)


@dataclasses.dataclass(frozen=True)
class Timer:
  """How programs are timed.

  Attributes:
    warmup: runs that are not timed.
    repeats: runs that are.
  """

  warmup: int
  repeats: int

  def time(
    self,
    name: str,
    run: Callable[[], Any],
    compile_seconds: float,
    compiled_bytes: Mapping[str, int],
  ) -> tuple[Measurement, Any]:
    """Times a program that has been compiled.

    Args:
      name: of the program.
      run: starts it and returns its result.
      compile_seconds: see `Measurement`.
      compiled_bytes: see `Measurement`.

    Returns:
      The measurement, and the result of the last run.
    """
    for _ in range(self.warmup):
      jax.block_until_ready(run())
    machine.return_freed_memory()
    reset_peak()
    result = None
    seconds = []
    cpu_seconds = []
    for _ in range(self.repeats):
      # Frees the result of the run before, which training would not hold either.
      result = None
      start = time.monotonic()
      cpu_start = time.process_time()
      result = jax.block_until_ready(run())
      cpu_seconds.append(time.process_time() - cpu_start)
      seconds.append(time.monotonic() - start)
    measurement = Measurement(
      name,
      tuple(seconds),
      tuple(cpu_seconds),
      compile_seconds,
      compiled_bytes,
      peak_bytes(),
    )
    return measurement, result


def reset_peak() -> None:
  """Lets `peak_bytes` of a CPU start anew, where the system can do that."""
  if _CLEAR_PEAK.exists():
    _CLEAR_PEAK.write_text(_RESET_PEAK)


def peak_bytes() -> int:
  """Returns the most memory held: by the fullest accelerator, or by this process on CPUs."""
  by_device = []
  for device in jax.local_devices():
    # CPUs have no statistics.
    statistics_of_device = device.memory_stats() or {}
    by_device.append(statistics_of_device.get("peak_bytes_in_use", 0))
  return max(by_device) or machine.peak_memory()


def compiled_bytes(compiled: jax.stages.Compiled) -> dict[str, int]:
  """Returns the bytes of one device that a compiled program needs, by kind."""
  analysis = compiled.memory_analysis()
  if analysis is None:
    return {}
  return {
    "arguments": analysis.argument_size_in_bytes,
    "results": analysis.output_size_in_bytes,
    "aliased": analysis.alias_size_in_bytes,
    "temporaries": analysis.temp_size_in_bytes,
  }

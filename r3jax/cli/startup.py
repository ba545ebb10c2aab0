"""Starts commands that run on many devices: processes, logs and the cache of compiled programs."""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import functools
import logging as python_logging
import os
import sys
from typing import Any

from absl import flags
from absl import logging
from etils import epath
import jax
import ml_collections

import r3jax
from r3jax.cli import command_line
from r3jax.files import caches
from r3jax.files import disk_errors
from r3jax.files import rules
from r3jax.files import texts
from r3jax.parallel import agreement
from r3jax.parallel import meshes
from r3jax.parallel import multihost
from r3jax.parallel import preemption


def define_flags() -> None:
  """Defines the flags that tell a process how to reach the others."""
  flags.DEFINE_string(
    "coordinator",
    "",
    "host:port of process 0, for several processes outside of Cloud TPU, GKE and SLURM.",
  )
  flags.DEFINE_integer(
    "num_processes", 1, "Number of processes, with --coordinator."
  )
  flags.DEFINE_integer(
    "process_id", 0, "Number of this process, with --coordinator."
  )
  command_line.limit(
    coordinator=rules.Text("HOST:PORT", r"\S+:[1-9]\d{0,4}"),
    num_processes=rules.Whole(1, 1_000_000),
    process_id=rules.Whole(0, 999_999),
  )
  flags.register_multi_flags_validator(
    ["coordinator", "num_processes", "process_id"],
    _is_process,
    "--process_id must be below --num_processes, and both need --coordinator",
  )


def _is_process(values: Mapping[str, Any]) -> bool:
  """Returns whether the flags that tell a process how to reach others agree."""
  if not values["coordinator"]:
    return values["num_processes"] == 1 and values["process_id"] == 0
  return values["process_id"] < values["num_processes"]


# Names the folder of compiled programs; JAX reads it too.
_CACHE_VARIABLE = "JAX_COMPILATION_CACHE_DIR"


def keep_programs(mesh: ml_collections.ConfigDict) -> epath.Path | None:
  """Turns on JAX's compilation cache; returns the folder of traced programs, beside the compiled.

  JAX_COMPILATION_CACHE_DIR names another folder than the default; where it is empty, or the folder
  cannot be made, nothing is kept and the result is None. Nothing is kept either where CPUs shard
  parameters: XLA of JAX 0.10 runs the collectives of a cached program in no fixed order there, so
  that devices wait for each other for ever.

  Args:
    mesh: config.mesh of the run; `start` has been called.
  """
  if jax.default_backend() == "cpu" and mesh.fsdp * mesh.tensor > 1:
    jax.config.update("jax_compilation_cache_dir", None)
    return None
  if os.environ.get(_CACHE_VARIABLE) == "":
    return None
  folder = caches.folder(_CACHE_VARIABLE, "compiled", may_be_read_only=True)
  jax.config.update(
    "jax_compilation_cache_dir", str(folder) if folder else None
  )
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
  return folder / "traced" if folder else None


def keep_stages() -> epath.Path | None:
  """Does what `keep_programs` does, for `r3jax.inference`, which uses all devices."""
  mesh = {"data": 1, "fsdp": jax.device_count(), "tensor": 1}
  return keep_programs(ml_collections.ConfigDict(mesh))


class _ForTerminal(python_logging.Formatter):
  """Formats a line for people: the message, behind its level where it is a warning or worse."""

  def format(self, record: python_logging.LogRecord) -> str:
    """See the class."""
    text = texts.printable(super().format(record))
    if record.levelno < python_logging.WARNING:
      return text
    return f"{record.levelname.lower()}: {text}"


def log_ours() -> None:
  """Restricts the log to lines of this package and to warnings of others.

  On a terminal the lines are short; a file or a pipe gets absl's, with time and source.
  """
  package_folder = os.path.dirname(r3jax.__file__)

  def is_shown(record) -> bool:
    if record.pathname.startswith(package_folder):
      return True
    # Orbax logs the tracebacks of errors that it raises, too.
    record.exc_info = None
    return record.levelno >= logging.converter.STANDARD_WARNING

  logging.set_verbosity(logging.INFO)
  handler = logging.get_absl_handler()
  handler.addFilter(is_shown)
  if sys.stderr is not None and sys.stderr.isatty():
    handler.setFormatter(_ForTerminal())
  sys.excepthook = functools.partial(_show_ours, sys.excepthook)


def _show_ours(show: Callable, kind: type, error: BaseException, trace) -> None:
  """Shows an exception that nobody has caught, but for those of a save that has failed already.

  Orbax closes its loop after the first error, and TensorStore prints that it is closed for every
  write that was still going on: thousands of lines.
  """
  if kind is RuntimeError and str(error) == "Event loop is closed":
    return
  show(kind, error, trace)


# Of XLA for CPUs: YNNPACK computes sums over rows (softmax, norms), and XLA itself products and
# convolutions, which YNNPACK takes longer for (docs/results/performance.md).
_LIBRARIES = "--xla_cpu_experimental_ynn_fusion_type=reduce"
# Of XLA for CPUs: hardly any optimization, which takes most of the time of a compilation.
_QUICK_COMPILE = (
  "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
)


def start(
  mesh: ml_collections.ConfigDict, rows: int, quick_compile: bool
) -> None:
  """Connects to the other processes; must be called before JAX touches a device.

  On the CPUs of one host every core becomes a device, as far as they split `rows` evenly, unless
  the config sets a mesh.

  Args:
    mesh: config.mesh of the run.
    rows: size of the batches that are split over devices.
    quick_compile: config.step.quick_compile of the run.
  """
  xla_flags = [_LIBRARIES]
  if quick_compile:
    xla_flags.append(_QUICK_COMPILE)
  # Those of the user come last: XLA takes the last value of a flag.
  xla_flags.append(os.environ.get("XLA_FLAGS", ""))
  os.environ["XLA_FLAGS"] = " ".join(xla_flags).strip()
  coordinator = flags.FLAGS.coordinator
  is_default = mesh.to_dict() == {"data": -1, "fsdp": 1, "tensor": 1}
  if not coordinator and is_default:
    meshes.use_all_cores(rows)
  multihost.initialize(
    coordinator, flags.FLAGS.num_processes, flags.FLAGS.process_id
  )


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
  """Ends all processes of the block together: where one fails, and where one is asked to end."""
  # The runtimes of the devices have started.
  preemption.ENDING.claim_signals()
  with multihost.ending_together(), agreement.ending_when_asked():
    try:
      yield
    except OSError as error:
      problem = disk_errors.message(error)
      if jax.process_count() == 1 or not problem:
        raise
      raise multihost.PlainError(problem) from error


def together(function: Callable, *arguments):
  """Returns function(*arguments), or ends all processes where it raises ValueError in one.

  The function must not wait for other processes. Every process exits with the message.
  """
  result = None
  problem = None
  try:
    result = function(*arguments)
  except ValueError as error:
    logging.debug("traceback", exc_info=True)
    problem = error
  try:
    multihost.raise_together(problem)
  except (ValueError, RuntimeError) as error:
    sys.exit(f"r3jax: {error}")
  return result

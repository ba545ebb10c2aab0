"""Compiles in a process of its own.

XLA aborts its process where a check of the compiler fails, and may take many GiB. The child
writes what it knows before every program, so that its end can be explained.
"""

from collections.abc import Sequence
import dataclasses
import os
import pathlib
import pickle
import subprocess
import sys
import tempfile

import jax

from r3jax.aot import measure
from r3jax.aot import report
from r3jax.aot import results
from r3jax.parallel import endings

_CHILD = "from r3jax.aot import child; child.answer()"


@dataclasses.dataclass(frozen=True)
class Request:
  """What a child does.

  Attributes:
    target: what is compiled, and for which slice.
    lists_candidates: only lists the meshes that can hold the run, see `measure.candidates`.
    effort: of XLA to produce fast code, from -1 (compiles fastest) to 1; 0 is its default.
    hlo_folder: gets the text of the compiled programs; "" keeps none.
  """

  target: measure.Target
  lists_candidates: bool = False
  effort: float = -1.0
  hlo_folder: str = ""


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What a child found.

  Attributes:
    compilation: what is known of the run; None where it cannot be built.
    candidates: of a request that lists them.
    compiling: name of the program that was being compiled; "" at the end.
    problem: why the run does not fit the slice; "" where it does.
    used: bytes of a chip that the largest program needs; None where that is not known.
  """

  compilation: results.Compilation | None = None
  candidates: Sequence[results.Compilation] = ()
  compiling: str = ""
  problem: str = ""
  used: int | None = None


def run(request: Request) -> Outcome:
  """Runs a request in a child process and returns what it found.

  A compilation that does not fit, and a child that was aborted, are outcomes with a problem.
  """
  # A TPU of this host belongs to other processes, and there may be no metadata server to ask.
  environment = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    **os.environ,
    "JAX_PLATFORMS": "cpu",
  }
  with tempfile.TemporaryDirectory() as folder:
    request_path = pathlib.Path(folder) / "request"
    outcome_path = pathlib.Path(folder) / "outcome"
    request_path.write_bytes(pickle.dumps(request))
    child = subprocess.Popen(
      [sys.executable, "-c", _CHILD, request_path, outcome_path],
      env=environment,
      stderr=subprocess.PIPE,
      text=True,
    )
    # A process that is asked to end must not leave a compilation behind.
    endings.before_end(child.kill)
    with child:
      _, message = child.communicate()
    outcome = Outcome()
    if outcome_path.exists():
      outcome = pickle.loads(outcome_path.read_bytes())
  if child.returncode:
    return explain_abort(outcome, child.returncode, message.strip())
  return outcome


def explain_abort(before: Outcome, returncode: int, message: str) -> Outcome:
  """Returns the outcome of a child that was aborted.

  Args:
    before: what it wrote last.
    returncode: of the process, not 0.
    message: what it printed.
  """
  shortage = report.out_of_memory(message)
  compilation = before.compilation
  if shortage and compilation:
    used, limit = shortage
    problem = report.shortage(
      before.compiling, used, limit, compilation.held, compilation.mesh
    )
    return dataclasses.replace(before, problem=problem, used=used)
  lines = message.splitlines() or ["no message"]
  telling = [
    line for line in lines if "Check failed" in line or "Error" in line
  ]
  last = (telling or lines)[-1]
  return dataclasses.replace(
    before, problem=f"the compiler ended with code {returncode}: {last}"
  )


# --- In the child ------------------------------------------------------------------------------


def _compile(request: Request, outcome_path: pathlib.Path) -> Outcome:
  """Compiles, or lists candidates; writes what is known meanwhile to outcome_path."""

  def note(compilation: results.Compilation, name: str) -> None:
    outcome = Outcome(compilation=compilation, compiling=name)
    outcome_path.write_bytes(pickle.dumps(outcome))

  def keep_text(name: str, text: str) -> None:
    if request.hlo_folder:
      folder = pathlib.Path(request.hlo_folder)
      folder.mkdir(parents=True, exist_ok=True)
      (folder / f"{name}.txt").write_text(text)

  try:
    if request.lists_candidates:
      return Outcome(candidates=measure.candidates(request.target))
    compilation = measure.measure(request.target, note, keep_text)
  except ValueError as error:
    return Outcome(problem=str(error))
  return Outcome(
    compilation=compilation,
    problem=report.problem(compilation),
    used=compilation.peak,
  )


def answer() -> None:
  """Reads the request whose path is the first argument; writes the outcome to the second."""
  request_path, outcome_path = map(pathlib.Path, sys.argv[1:])
  request = pickle.loads(request_path.read_bytes())
  jax.config.update("jax_exec_time_optimization_effort", request.effort)
  outcome = _compile(request, outcome_path)
  outcome_path.write_bytes(pickle.dumps(outcome))

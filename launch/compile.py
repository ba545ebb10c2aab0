"""Compiles a run for a TPU slice that is not there: does it fit, how long does it take?

  python launch/compile.py --config=configs/r3_geneval.py:v5p-128 --topology=v5p:4x4x4 \
    [--program=step|evaluate|generate] [--out=FILE.json] [--find=1] [--config.KEY=VALUE ...]

Needs the extra `[aot]` (libtpu) and no TPU. Without `model.folder` the sizes are BAGEL-7B-MoT's.
Exits with 1 where a program does not fit or the compiler fails, and says what to change.
`--find=N` tries meshes and micro-batches, the fastest by the roofline first, until N of them fit.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile

from absl import app
from absl import flags
from ml_collections import config_flags

# config files import each other
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Config file, with its variant.", lock_config=True
)
_TOPOLOGY = flags.DEFINE_string(
  "topology", None, "Slice, for example v5p:4x4x4."
)
_PROGRAM = flags.DEFINE_enum(
  "program", "step", ["step", "evaluate", "generate"], "What is compiled."
)
_FIND = flags.DEFINE_integer("find", 0, "Search until so many meshes fit.", 0)
_OUT = flags.DEFINE_string("out", "", "JSON file that gets the numbers.")
_LAYERS = flags.DEFINE_integer(
  "layers",
  None,
  "Layers of the language model, in place of all; for quick looks.",
  1,
)
_EFFORT = flags.DEFINE_float(
  "effort",
  -1.0,
  "How hard XLA looks for fast code: -1 compiles fastest, 0 is its default.",
  -1.0,
  1.0,
)
_HLO = flags.DEFINE_string(
  "hlo", "", "Folder that gets the text of the compiled programs."
)
_CHILD = flags.DEFINE_string(
  "child", "", "Internal: the file that the compiling process writes."
)


def _in_child(path: pathlib.Path):
  """Compiles, or searches, in this process, which the compiler may abort."""
  # there is no metadata server to ask
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  # no chip is taken that another process could want
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  os.environ["JAX_PLATFORMS"] = "cpu"
  import jax  # after the environment is set

  from r3jax.aot import measure

  jax.config.update("jax_exec_time_optimization_effort", _EFFORT.value)
  target = measure.Target(
    _PROGRAM.value, _CONFIG.value, _TOPOLOGY.value, _LAYERS.value
  )
  write = lambda found: path.write_text(json.dumps(found))
  if _FIND.value:
    write(measure.candidates(target))
  else:
    measure.measure(target, write, _keep_text)


def _keep_text(name: str, text: str):
  if _HLO.value:
    folder = pathlib.Path(_HLO.value)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.txt").write_text(text)


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What a child came to.

  Attributes:
    found: what it wrote.
    problem: why the run cannot be on the slice; empty where it can.
    used: bytes of a chip that the largest program needs, None where that is not known.
  """

  found: dict | list
  problem: str = ""
  used: int | None = None


def _child(*arguments: str) -> Outcome:
  """Runs this command in a process of its own."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "found.json"
    command = [sys.executable, *sys.argv, *arguments, f"--child={path}"]
    process = subprocess.run(
      command, stderr=subprocess.PIPE, text=True, check=False
    )
    found = json.loads(path.read_text()) if path.exists() else {}
  if process.returncode:
    return _failure(process, found)
  return Outcome(found)


def _failure(process: subprocess.CompletedProcess, before: dict) -> Outcome:
  """Tells why a child failed, and what to change."""
  from r3jax.aot import report

  message = process.stderr.strip()
  _, ours, text = message.rpartition("\nValueError: ")
  if ours:
    return Outcome(before, text)
  memory = report.out_of_memory(message)
  if memory and before:
    return Outcome(
      before,
      report.needs(
        before["compiling"], *memory, before["held"], before["mesh"]
      ),
      memory[0],
    )
  checks = [
    line
    for line in message.splitlines()
    if "Check failed" in line or "Error" in line
  ]
  last = (checks or message.splitlines() or ["no message"])[-1]
  return Outcome(
    before, f"the compiler ended with code {process.returncode}: {last}"
  )


def _measure(*arguments: str) -> Outcome:
  """Compiles, and compares with the memory of a chip."""
  from r3jax.aot import report

  outcome = _child(*arguments)
  if outcome.problem:
    return outcome
  name, used = report.largest(outcome.found)
  return Outcome(outcome.found, report.problem(outcome.found, name), used)


def _find(number: int) -> list[dict]:
  """Compiles one candidate after the other, in more micro-batches while it does not fit; returns those that fit."""
  from r3jax.aot import report
  from r3jax.aot import search

  ranked, fitting, config = _child(), [], _CONFIG.value
  if ranked.problem:
    sys.exit(f"r3jax: {ranked.problem}")
  for candidate in ranked.found:
    mesh, held, hbm = (candidate[name] for name in ("mesh", "held", "hbm"))
    splits = (
      [1]
      if _PROGRAM.value != "step"
      else search.micro_batches(
        config.groups_per_step, config.group_size, mesh["data"]
      )
    )
    tried = splits[0]
    while tried and len(fitting) < number:
      changed = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
      outcome = _measure(
        "--find=0", *changed, f"--config.step.micro_batches={tried}"
      )
      print(
        f"{mesh}, {tried} micro-batches: {outcome.problem or report.fits(outcome.found)}",
        flush=True,
      )
      if not outcome.problem:
        fitting.append(outcome.found)
        break
      tried = outcome.used and search.more(
        splits, tried, outcome.used - held, hbm - held
      )
  return sorted(fitting, key=report.seconds)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  if _CHILD.value:
    return _in_child(pathlib.Path(_CHILD.value))
  from r3jax.aot import report

  outcome = Outcome(_find(_FIND.value)) if _FIND.value else _measure()
  found, problem = outcome.found, outcome.problem
  shown = found if _FIND.value else [found] if found.get("programs") else []
  print("\n\n".join(report.table(one) for one in shown))
  if _OUT.value and shown:
    pathlib.Path(_OUT.value).write_text(json.dumps(found, indent=1) + "\n")
  if problem or not shown:
    sys.exit(f"r3jax: {problem or 'nothing fits'}")


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "topology"])
  app.run(main)

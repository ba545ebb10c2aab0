"""Compiles the fused step for a TPU slice that is not there: does it fit, how long does it take?

  python launch/compile.py --config=configs/r3_geneval.py --topology=v5p:4x4x4 \
    --config.mesh.fsdp=2 --config.mesh.tensor=4 [--out=FILE.json] [--config.KEY=VALUE ...]

Needs the extra `[aot]` (libtpu) and no TPU. Without `model.folder` the sizes are BAGEL-7B-MoT's.
Exits with 1 where the step does not fit or the compiler fails, and says what to change.
"""

import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

from absl import app
from absl import flags
from ml_collections import config_flags

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # config files import each other

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, with its variant.", lock_config=True)
_TOPOLOGY = flags.DEFINE_string("topology", None, "Slice, for example v5p:4x4x4.")
_OUT = flags.DEFINE_string("out", "", "JSON file that gets the numbers.")
_LAYERS = flags.DEFINE_integer("layers", None, "Layers of the language model, in place of all; for quick looks.", 1)
_EFFORT = flags.DEFINE_float("effort", -1.0, "How hard XLA looks for fast code: -1 compiles fastest, 0 is its default.", -1.0, 1.0)
_HLO = flags.DEFINE_string("hlo", "", "File that gets the compiled program's text.")
_CHILD = flags.DEFINE_string("child", "", "Internal: the file that the compiling process writes.")


def _compile(path: pathlib.Path):
  """Compiles in this process and writes what was found."""
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is taken that another process could want
  os.environ["JAX_PLATFORMS"] = "cpu"
  import jax  # after the environment is set
  from jax.experimental import topologies

  from r3jax import experiment
  from r3jax.aot import chips, costs, hlo, programs, report
  from r3jax.parallel import mesh as mesh_lib

  jax.config.update("jax_exec_time_optimization_effort", _EFFORT.value)
  chip = chips.of_topology(_TOPOLOGY.value)
  try:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=_TOPOLOGY.value).devices
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(f"libtpu refuses the topology {_TOPOLOGY.value!r}: {error}\n{chips.known()}") from error
  config = _CONFIG.value
  if config.model.attention == "auto":  # as on the TPU itself
    config.model.attention = experiment.attention_on("tpu", programs.model_sizes(config, None).llm.head_dim)
  mesh = mesh_lib.make_mesh_on(devices, **config.mesh)
  program = programs.step(config, mesh, _LAYERS.value)
  path.write_text(json.dumps({"arguments": program.bytes_by_kind(), "mesh": dict(mesh.shape)}))  # if what follows fails
  lowered, start = program.lower(), time.monotonic()
  compiled = lowered.compile()
  seconds, text = time.monotonic() - start, compiled.as_text()
  if _HLO.value:
    pathlib.Path(_HLO.value).write_text(text)
  llm, settings = program.modules.bagel.config.llm, program.settings
  stages = costs.iteration(
      llm, settings, mesh.shape["data"], config.model.remat != "none", not config.model.lora.rank
  )
  path.write_text(json.dumps({
      "topology": _TOPOLOGY.value, "mesh": dict(mesh.shape), "layers": llm.num_layers,
      "samples": settings.groups * settings.group_size, "micro_batches": settings.micro_batches,
      "compile_seconds": seconds, "hbm": chip.hbm,
      "memory": report.memory(compiled.memory_analysis(), program.bytes_by_kind()),
      "stages": {name: vars(cost) | {"seconds": cost.seconds(chip, mesh.size)} for name, cost in stages.items()},
      "collectives": report.traffic(hlo.collectives(text)),
      "compiler_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
  }))


def _failure(process: subprocess.CompletedProcess, before: dict) -> str:
  """Says why the compiling process failed, and what to change."""
  from r3jax.aot import report

  message = process.stderr.strip()
  _, ours, text = message.rpartition("\nValueError: ")
  if ours:
    return text
  memory = report.out_of_memory(message)
  if memory and before:
    used, limit = memory
    return (f"the step needs {used / report.GIB:.1f} GiB of a chip that has {limit / report.GIB:.1f}: "
            + report.advice(used, limit, sum(before["arguments"].values()), before["mesh"]))
  checks = [line for line in message.splitlines() if "Check failed" in line or "Error" in line]
  return f"the compiler ended with code {process.returncode}: {(checks or message.splitlines() or ['no message'])[-1]}"


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  if _CHILD.value:
    return _compile(pathlib.Path(_CHILD.value))
  from r3jax.aot import report

  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "found.json"
    process = subprocess.run([sys.executable, *sys.argv, f"--child={path}"], stderr=subprocess.PIPE, text=True, check=False)
    found = json.loads(path.read_text()) if path.exists() else {}
  if process.returncode or "memory" not in found:
    sys.exit(f"r3jax: {_failure(process, found)}")
  print(report.table(found))
  if _OUT.value:
    pathlib.Path(_OUT.value).write_text(json.dumps(found, indent=1) + "\n")
  peak, hbm = found["memory"]["peak"], found["hbm"]
  if peak > hbm:
    held = sum(found["memory"][name] for name in found["memory"] if name not in ("temporaries", "results", "program", "peak"))
    sys.exit(f"r3jax: the step needs {peak / report.GIB:.1f} GiB of a chip that has {hbm / report.GIB:.1f}: "
             + report.advice(peak, hbm, held, found["mesh"]))


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "topology"])
  app.run(main)

r"""Compiles a run for a TPU slice, without a TPU, and reports memory, time and communication.

  r3jax compile --config=r3_geneval:v5p-128 --topology=v5p:4x4x4 \
    [--program=step|evaluate|generate] [--out=FILE.json] [--find=1] [--config.KEY=VALUE ...]

Needs the extra `aot` (libtpu). Without `model.folder` the sizes are those of BAGEL-7B-MoT. Where a
program does not fit or the compiler fails, the message names what to change and the exit code is 1.
`--find=N` tries meshes and micro-batches, the fastest by the roofline first, until N of them fit.
"""

import dataclasses
import json
import pathlib
import sys

from absl import flags
from ml_collections import config_flags

from r3jax.aot import child
from r3jax.aot import fit
from r3jax.aot import measure
from r3jax.aot import programs
from r3jax.aot import report


def define_flags() -> None:
  """Defines the flags of the command."""
  config_flags.DEFINE_config_file(
    "config", None, "Config file by name or path, with its variant."
  )
  flags.DEFINE_string("topology", None, "Slice, for example v5p:4x4x4.")
  flags.DEFINE_enum(
    "program", "step", list(programs.COMMANDS), "What is compiled."
  )
  flags.DEFINE_integer(
    "find",
    0,
    "Number of fitting meshes to search for; 0 compiles the config's.",
    0,
  )
  flags.DEFINE_string("out", "", "JSON file that gets the numbers.")
  flags.DEFINE_integer(
    "layers",
    None,
    "Number of layers of the language model, for quick looks. Default: all.",
    1,
  )
  flags.DEFINE_float(
    "effort",
    -1.0,
    "Effort of XLA to produce fast code: -1 compiles fastest, 0 is its default.",
    -1.0,
    1.0,
  )
  flags.DEFINE_string(
    "hlo", "", "Folder that gets the text of the compiled programs."
  )
  flags.mark_flags_as_required(["config", "topology"])


def run() -> None:
  """Compiles, prints a report, and exits with a message where nothing fits."""
  values = flags.FLAGS
  target = measure.Target(
    values.program, values.config, values.topology, values.layers
  )
  request = child.Request(target, effort=values.effort, hlo_folder=values.hlo)
  if values.find:
    try:
      compilations = fit.find(
        request, values.find, lambda line: print(line, flush=True)
      )
    except ValueError as error:
      sys.exit(f"r3jax: {error}")
    problem = "" if compilations else "nothing fits"
  else:
    outcome = child.run(request)
    problem = outcome.problem
    is_compiled = outcome.compilation and outcome.compilation.programs
    compilations = [outcome.compilation] if is_compiled else []
  print("\n\n".join(map(report.table, compilations)))
  if values.out and compilations:
    numbers = [dataclasses.asdict(compilation) for compilation in compilations]
    content = numbers if values.find else numbers[0]
    pathlib.Path(values.out).write_text(json.dumps(content, indent=1) + "\n")
  if problem:
    sys.exit(f"r3jax: {problem}")

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
from r3jax.cli import command_line
from r3jax.costs import chips
from r3jax.files import config_guard
from r3jax.files import rules


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
  )
  flags.DEFINE_string("out", "", "JSON file that gets the numbers.")
  flags.DEFINE_integer(
    "layers",
    None,
    "Number of layers of the language model, for quick looks. Default: all.",
  )
  flags.DEFINE_float(
    "effort",
    -1.0,
    "Effort of XLA to produce fast code: -1 compiles fastest, 0 is its default.",
  )
  flags.DEFINE_string(
    "hlo", "", "Folder that gets the text of the compiled programs."
  )
  command_line.require(config="a config file", topology="a TPU slice")
  names = "|".join(chips.CHIPS)
  command_line.limit(
    topology=rules.Text(
      f"CHIP:SHAPE with a chip among {', '.join(chips.CHIPS)}",
      rf"({names}):\d+(x\d+)+",
      may_be_empty=False,
    ),
    find=rules.Whole(0, 1_000),
    layers=rules.Whole(1, 1_000),
    effort=rules.Real(-1, 1),
  )


def run() -> None:
  """Compiles, prints a report, and exits with a message where nothing fits."""
  values = flags.FLAGS
  try:
    _check_outputs()
  except ValueError as error:
    sys.exit(f"r3jax: {error}")
  target = measure.Target(
    values.program, values.config, values.topology, values.layers
  )
  request = child.Request(target, effort=values.effort, hlo_folder=values.hlo)
  if values.find:
    _find(request)
  else:
    _compile(request)


def _check_outputs() -> None:
  """Checks before minutes of compilation that what it gives can be written.

  Raises:
    ValueError: a folder cannot be made or written.
  """
  values = flags.FLAGS
  if values.out:
    parent = pathlib.Path(values.out).parent
    config_guard.check_writable(parent, "the folder of --out")
  if values.hlo:
    config_guard.check_writable(values.hlo, "--hlo")


def _find(request: child.Request) -> None:
  """Searches for meshes that fit."""
  try:
    compilations = fit.find(request, flags.FLAGS.find, _print_now)
  except ValueError as error:
    sys.exit(f"r3jax: {error}")
  if not compilations:
    sys.exit("r3jax: nothing fits")
  print("\n\n".join(map(report.table, compilations)))
  _write([dataclasses.asdict(compilation) for compilation in compilations])


def _compile(request: child.Request) -> None:
  """Compiles for the mesh of the config."""
  outcome = child.run(request)
  compilation = outcome.compilation
  # A compilation that failed may have compiled programs before.
  if compilation and compilation.programs:
    print(report.table(compilation))
    _write(dataclasses.asdict(compilation))
  if outcome.problem:
    sys.exit(f"r3jax: {outcome.problem}")


def _print_now(line: str) -> None:
  print(line, flush=True)


def _write(numbers: dict | list[dict]) -> None:
  """Writes the numbers to --out, where it is given."""
  if flags.FLAGS.out:
    text = json.dumps(numbers, indent=1)
    pathlib.Path(flags.FLAGS.out).write_text(f"{text}\n")

r"""Measures an iteration with random weights: stage by stage, fused and split.

  r3jax benchmark --config=benchmark:peer [--json=FILE] [--page=FILE#NAME] \
    [--programs=fused,split,think,...] [--sweep [--plot=FILE]] [--config.KEY=VALUE ...]

Prints seconds, operations, memory and compilation of every program beside what the machine can do,
which is measured before and behind them, and writes all numbers to --json. It needs no model, no
prompts and no network. Compilation is measured cold unless JAX_COMPILATION_CACHE_DIR names a folder
of compiled programs. `--sweep` measures the parts at several sizes of groups, images and thoughts
instead, and fits lines to their seconds.
"""

from collections.abc import Sequence
import dataclasses
import json
import pathlib
import sys

from absl import flags
import jax
import ml_collections
from ml_collections import config_flags

from r3jax import types
from r3jax.benchmark import ceilings
from r3jax.benchmark import iterations
from r3jax.benchmark import measure
from r3jax.benchmark import parts
from r3jax.benchmark import report
from r3jax.benchmark import subject
from r3jax.benchmark import sweep
from r3jax.benchmark import workload
from r3jax.cli import command_line
from r3jax.cli import startup
from r3jax.files import config_guard
from r3jax.files import rules
from r3jax.run import sessions

_PROGRAMS = (*workload.ITERATIONS, *parts.NAMES)


def define_flags() -> None:
  """Defines the flags of the command."""
  config_flags.DEFINE_config_file(
    "config", None, "Config file by name or path, with its variant."
  )
  flags.DEFINE_list("programs", list(_PROGRAMS), "What is measured, by name.")
  flags.DEFINE_string("json", "", "JSON file that gets the numbers.")
  flags.DEFINE_boolean("sweep", False, "Measures parts at several sizes.")
  flags.DEFINE_string("plot", "", "PNG file that gets the plot of --sweep.")
  flags.DEFINE_string(
    "page",
    "",
    "Page and, behind #, the name of the block in it that gets the table.",
  )
  startup.define_flags()
  command_line.require(config="a config file")
  command_line.limit(
    programs=rules.Several(rules.OneOf(_PROGRAMS)),
    page=rules.Text("FILE#NAME", r".+#.+"),
  )


def run() -> None:
  """Measures and prints, and exits with a message where the config cannot be used."""
  values = flags.FLAGS
  config = values.config
  startup.start(config.mesh, config.group_size, config.step.quick_compile)
  try:
    for name in ("json", "plot"):
      if values[name].value:
        folder = pathlib.Path(values[name].value).parent
        config_guard.check_writable(folder, f"the folder of --{name}")
    _write_page("")  # whether it can be written, before minutes of work
    if values.sweep:
      table, numbers = _sweep(config, values.programs)
    else:
      table, numbers = _benchmark(config, values.programs)
  except ValueError as error:
    sys.exit(f"r3jax: {error}")
  if jax.process_index():
    return
  print(f"\n{table}")
  _write_page(table)
  if values.json:
    text = json.dumps(numbers, indent=1)
    pathlib.Path(values.json).write_text(f"{text}\n")


def _benchmark(
  config: ml_collections.ConfigDict, names: Sequence[str]
) -> tuple[str, dict]:
  """Measures programs by name; returns the table and the JSON values."""
  session, policy = subject.build(config)
  dtype = session.stages.modules.bagel.dtype
  before = ceilings.measure(session.mesh, dtype)
  measurements = _measure(session, policy, names)
  after = ceilings.measure(session.mesh, dtype)
  result = report.Result(session, measurements, before, after)
  return report.table(result), report.as_json(result)


def _sweep(
  config: ml_collections.ConfigDict, names: Sequence[str]
) -> tuple[str, dict]:
  """Measures parts by name at several sizes; returns the table and the JSON values."""
  part_names = [name for name in parts.NAMES if name in names]

  def note(point: sweep.Point) -> None:
    print(
      f"{point.axis:22}{point.value:5}  {point.part:16}{point.seconds:10.3f} s",
      flush=True,
    )

  points = sweep.run(config, part_names, note)
  if flags.FLAGS.plot:
    sweep.plot(points).savefig(flags.FLAGS.plot)
  values = [dataclasses.asdict(point) for point in points]
  return sweep.table(points), {"sweep": values}


def _measure(
  session: sessions.Session, policy: types.Params, names: Sequence[str]
) -> list[measure.Measurement]:
  """Measures programs by name and prints a line for each as it ends."""
  config = session.config
  measurements = []

  def note(measurement: measure.Measurement) -> None:
    measurements.append(measurement)
    print(report.line(measurement), flush=True)

  print(report.heading(), flush=True)
  timer = measure.Timer(config.benchmark.warmup, config.benchmark.repeats)
  with jax.set_mesh(session.mesh):
    # Whole iterations come first: nothing else is in memory then.
    if "fused" in names:
      note(iterations.measure_fused(session, policy, timer))
    if "split" in names:
      note(iterations.measure_split(session, policy, timer))
    part_names = [name for name in parts.NAMES if name in names]
    if part_names:
      recorder = parts.Recorder(session.mesh, timer, part_names, note)
      parts.measure_parts(session, session.init(policy), recorder)
  return measurements


def _write_page(table: str) -> None:
  """Writes a table to the block of --page; "" only checks that the block is there.

  Raises:
    ValueError: it is not.
  """
  name = flags.FLAGS.page
  if not name:
    return
  file, _, block = name.rpartition("#")
  path = pathlib.Path(file)
  try:
    page = report.with_table(path.read_text(), block, table)
  except OSError as error:
    raise ValueError(
      f"--page must name a page; got {name!r}: {error}"
    ) from error
  if table:
    path.write_text(page)

"""Trains the arms of a study with several seeds, and tests the paper's claims with them.

  r3jax study STUDY --config=r3_geneval:shapes --workdir=DIR [--seeds=3] [--config.KEY=VALUE ...]

STUDY is main, tree, rounds, stop-reward, transfer or defects, see docs/howto/study.md. Every run is
an ordinary `r3jax train` in DIR/runs/ARM/seed_N; runs that have finished are not repeated, and one
that was cut off resumes. After every run the tables, plots and the page in DIR are written again.
Keys of the config are set in all runs. --seeds may be raised later.
"""

from collections.abc import Sequence
import difflib
import signal
import subprocess
import sys

from absl import flags
from ml_collections import config_flags

from r3jax.cli import command_line
from r3jax.cli import startup
from r3jax.files import config_guard
from r3jax.files import ownership
from r3jax.files import paths
from r3jax.files import rules
from r3jax.parallel import preemption
from r3jax.study import declarations
from r3jax.study import results
from r3jax.study import runs
from r3jax.study import study_report


def define_flags() -> None:
  """Defines the flags of the command."""
  config_flags.DEFINE_config_file(
    "config", None, "Config file by name or path, with its variant."
  )
  flags.DEFINE_string("workdir", None, "Folder of the study.")
  flags.DEFINE_integer("seeds", 3, "Number of seeds, from 0 on.")
  command_line.require(
    config="a config file",
    workdir="the folder of the study",
  )
  command_line.limit(seeds=rules.Whole(1, 1_000))


@ownership.releasing()
def run(name: str) -> None:
  """Runs what is missing, and prints the tables."""
  startup.log_ours()
  runs.leave_devices()
  try:
    plan = _plan(name)
    for arm in plan.study.arms:
      plan.config(arm)
    config_guard.check(plan.folder, plan.identity(), runs.MAY_DIFFER)
    config_guard.check_writable(plan.folder, "workdir")
    ownership.claim(plan.folder)
    config_guard.write_or_check(plan.folder, plan.identity(), runs.MAY_DIFFER)
    text = ""
    for _ in runs.run_missing(plan, _run):
      finished_runs = runs.read_finished(plan)
      text = study_report.write(
        plan, finished_runs, results.compute(plan, finished_runs)
      )
  except ValueError as error:
    sys.exit(f"r3jax: {error}")
  except runs.Failed as error:
    print(f"r3jax: {error}", file=sys.stderr)
    sys.exit(error.code)
  print(text)
  print(f"page: {plan.folder / 'index.html'}")


def _plan(name: str) -> runs.Plan:
  """Returns the study that the command line describes.

  Raises:
    ValueError: There is no such study.
  """
  studies = declarations.STUDIES
  if name not in studies:
    message = f"STUDY must be one of {', '.join(studies)}; got {name!r}"
    for nearest in difflib.get_close_matches(name, studies, n=1):
      message += f"; did you mean {nearest}?"
    raise ValueError(message)
  config_name = command_line.flag_value(sys.argv, "config") or ""
  return runs.Plan(
    study=studies[name],
    folder=paths.of_user(flags.FLAGS.workdir),
    config_name=config_name,
    overrides=runs.overrides_of(flags.FLAGS.config, config_name),
    seeds=range(flags.FLAGS.seeds),
  )


def _run(command: Sequence[str]) -> int:
  """Runs a command, which gets this process's signals; returns its exit code."""
  # The command saves and says so; this process waits for it.
  preemption.ENDING.leave_signals()
  process = subprocess.Popen(command)

  def hand_on(number: int, unused_frame) -> None:
    process.send_signal(number)

  former = {}
  for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    # `nohup` has switched off the last one, for the command too.
    if signal.getsignal(number) != signal.SIG_IGN:
      former[number] = signal.signal(number, hand_on)
  try:
    return process.wait()
  finally:
    for number, handler in former.items():
      signal.signal(number, handler)

"""Compares finished evaluations.

  r3jax compare A B ... --workdir=DIR

A, B, ... are folders of evaluations, or workdirs of runs: all evaluations of a single run are
compared with its first, and of several runs the last evaluation of each.
"""

from absl import flags
from etils import epath

from r3jax.cli import command_line
from r3jax.cli import startup
from r3jax.evaluation import finished
from r3jax.files import ownership
from r3jax.files import paths
from r3jax.report import comparison_report


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_string("workdir", None, "Folder to write.")
  command_line.require(workdir="the folder to write")


def run(*evaluations: str) -> None:
  """Compares, and exits with a message where an evaluation cannot be read."""
  startup.log_ours()
  startup.together(_compare, evaluations)


@ownership.releasing()
def _compare(evaluations: tuple[str, ...]) -> None:
  groups = [finished.read(path) for path in evaluations]
  folder = epath.Path(flags.FLAGS.workdir)
  ownership.claim(folder)
  print(comparison_report.write(groups, folder, seed=0))
  print(f"files: {paths.absolute(folder)}")

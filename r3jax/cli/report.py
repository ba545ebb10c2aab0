"""Prints the summary of a finished run, and the path of its report.

  r3jax report DIR

DIR is the workdir of the run.
"""

import sys

from etils import epath

from r3jax.files import damage
from r3jax.files import paths
from r3jax.report import run_page


def define_flags() -> None:
  """Defines no flags: the command takes the workdir only."""


def run(workdir: str) -> None:
  """Prints, and exits with a message where the run has no summary."""
  folder = epath.Path(workdir)
  path = folder / "summary.json"
  if not path.is_file():
    sys.exit(
      f"r3jax: a finished run must have summary.json; not found: {path}"
      f"{paths.did_you_mean(folder)}"
    )
  remedy = "Delete it, and give the command of the run again: it writes it anew"
  try:
    with damage.explained(path, "the summary of a run", remedy):
      summary = run_page.RunSummary.from_json(damage.read_object(path))
      lines = run_page.summary_lines(summary)
  except ValueError as error:
    sys.exit(f"r3jax: {error}")
  print(f"report: {folder / 'report' / 'index.html'}")
  for line in lines:
    print(line)

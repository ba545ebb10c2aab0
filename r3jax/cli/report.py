"""Prints the summary of a finished run, and the path of its report.

  r3jax report DIR

DIR is the workdir of the run.
"""

import json
import sys

from etils import epath

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
  print(f"report: {folder / 'report' / 'index.html'}")
  summary = run_page.RunSummary.from_json(json.loads(path.read_text()))
  for line in run_page.summary_lines(summary):
    print(line)

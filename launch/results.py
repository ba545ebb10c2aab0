r"""Runs the quickstart's training with several seeds; writes its table into the docs.

  python launch/results.py [--seeds=5] [--runs=runs/results]

Needs a checkout without uncommitted changes, since the table names the commit. The runs are kept in
RUNS/COMMIT/seed_N; those that are finished are not run again, one that was asked to end resumes.
Some 8 minutes a seed on two cores.
"""

import json
import pathlib
import signal
import subprocess
import sys

from absl import app
from absl import flags

from r3jax.report import seed_table

_SEEDS = flags.DEFINE_integer("seeds", 5, "Number of seeds, from 0 on.", 1)
_RUNS = flags.DEFINE_string("runs", "runs/results", "Folder of the workdirs.")

_ROOT = pathlib.Path(__file__).parents[1]
_PAGE = _ROOT / "docs" / "embedded_world.md"
_BLOCK = "quickstart"


def _git(*arguments: str) -> str:
  """Returns what a git command prints about this checkout."""
  command = ["git", "-C", str(_ROOT), *arguments]
  return subprocess.check_output(command, text=True).strip()


def _run(command: list[str]) -> None:
  """Runs a command, which gets this process's signals; exits with its code if that is not 0."""
  process = subprocess.Popen(command)

  def hand_on(number: int, unused_frame) -> None:
    process.send_signal(number)

  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, hand_on)
  code = process.wait()
  if code:
    sys.exit(code)


def _summary(workdir: pathlib.Path, seed: int) -> dict:
  """Returns the summary of the run with a seed, which is run where there is none."""
  path = workdir / "summary.json"
  if not path.exists():
    command = [
      sys.executable,
      str(_ROOT / "launch" / "tpu.py"),
      f"--config={_ROOT}/configs/r3_geneval.py:shapes",
      f"--workdir={workdir}",
      f"--config.seed={seed}",
    ]
    _run(command)
  return json.loads(path.read_text())


def _caption(summaries: list[dict], commit: str) -> str:
  first = summaries[0]
  versions = first["versions"]
  return (
    f"Written by `python launch/results.py --seeds={len(summaries)}` at commit "
    f"{commit}: {first['iterations']} iterations with each of the seeds 0 to "
    f"{len(summaries) - 1}, jax {versions['jax']}, {versions['devices']} "
    f"devices of kind {versions['device']}."
  )


def main(argv: list[str]) -> None:
  """Runs what is missing, then writes the table."""
  if argv[1:]:
    sys.exit(f"r3jax: results takes flags only; got {argv[1:]}")
  if _git("status", "--porcelain", "--untracked-files=no"):
    sys.exit("r3jax: results needs a checkout without uncommitted changes")
  commit = _git("rev-parse", "--short=10", "HEAD")

  folder = pathlib.Path(_RUNS.value) / commit
  summaries = [
    _summary(folder / f"seed_{seed}", seed) for seed in range(_SEEDS.value)
  ]
  content = seed_table.to_markdown(
    seed_table.rows(summaries), _caption(summaries, commit)
  )
  _PAGE.write_text(seed_table.replace_block(_PAGE.read_text(), _BLOCK, content))
  print(content)


if __name__ == "__main__":
  app.run(main)

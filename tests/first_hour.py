r"""Runs docs/howto/first_hour.md in a clean clone, step by step, and takes the time of each.

  python -m tests.first_hour --out=DIR [--steps=1,2,3,4] [--python=PYTHON] [--write]

DIR gets the clone of this checkout's last commit, with caches that are empty at first, a log per
step and times.json. Steps may be run by several calls, in their order. The commands and files are
those of the page. A step is done when what it promises is there: the first picture, the first
iteration, the page of the comparison; its commands then run to their end all the same. Without
--python the clone gets an environment of its own, as the page says, which takes minutes and a
network. --write puts the table into the page of this checkout.

The exit code is 1 where a command fails. Some 15 minutes on two quiet cores.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import re
import resource
import subprocess
import sys
import time

from r3jax.report import seed_table

ROOT = pathlib.Path(__file__).parents[1]
PAGE = pathlib.Path("docs/howto/first_hour.md")
_FILE = re.compile(r"as `([\w.]+)`:\n\n```\w+\n(.*?)^```", re.M | re.S)
_COMMANDS = re.compile(r"^```bash\n(.*?)^```", re.M | re.S)
_BLOCK = "first hour"


@dataclasses.dataclass(frozen=True)
class Promise:
  """What a step of the page promises.

  Attributes:
    text: what its reader has then.
    pattern: of the file that shows it, which is not empty.
    goal: minutes within which it should be there, beside installation.
  """

  text: str
  pattern: str
  goal: int


# By the number of the step, which begins its heading.
PROMISES = {
  1: Promise("the first picture", "drawn/*.png", 6),
  2: Promise("an own reward trains", "runs/red/metrics.jsonl", 10),
  3: Promise("own prompts train", "runs/mine/metrics.jsonl", 8),
  4: Promise("two runs are compared", "compared/index.html", 5),
}


@dataclasses.dataclass(frozen=True)
class Step:
  """A section of the page.

  Attributes:
    files: content of the files that the reader saves, by name.
    commands: lines for a shell.
  """

  files: dict[str, str]
  commands: str


def steps(page: str) -> dict[int, Step]:
  """Returns the numbered sections of the page's text; 0 is the installation."""
  sections = {}
  for section in page.split("\n## ")[1:]:
    title = section.partition("\n")[0]
    number = re.match(r"(\d+)\. ", title)
    if not number and title != "Installation":
      continue
    blocks = _COMMANDS.findall(section)
    files = dict(_FILE.findall(section))
    sections[int(number[1]) if number else 0] = Step(files, "".join(blocks))
  return sections


def _is_kept(folder: pathlib.Path, pattern: str) -> bool:
  return any(path.stat().st_size for path in folder.glob(pattern))


def run(
  step: Step,
  clone: pathlib.Path,
  log: pathlib.Path,
  environment: dict[str, str],
  pattern: str,
) -> dict[str, float]:
  """Runs a step in the clone.

  Args:
    step: what to save and to run.
    clone: the working directory.
    log: file for what it prints.
    environment: variables of its commands.
    pattern: of the file whose time is taken.

  Returns:
    Minutes until that file is there ("until"), and until the end ("end"), and CPU minutes ("cpu").

  Raises:
    RuntimeError: a command fails, or the file is not there at the end.
  """
  for name, content in step.files.items():
    (clone / name).write_text(content)
  start = time.monotonic()
  used = resource.getrusage(resource.RUSAGE_CHILDREN)
  until = None
  with log.open("w") as file:
    process = subprocess.Popen(
      ["bash", "-e", "-c", step.commands],
      cwd=clone,
      env=environment,
      stdout=file,
      stderr=subprocess.STDOUT,
    )
    while process.poll() is None:
      if until is None and _is_kept(clone, pattern):
        until = time.monotonic() - start
      time.sleep(0.2)
  end = time.monotonic() - start
  if process.returncode:
    raise RuntimeError(f"the commands must end well; see {log}")
  if until is None and not _is_kept(clone, pattern):
    raise RuntimeError(f"{pattern} must be there in {clone}; see {log}")
  now = resource.getrusage(resource.RUSAGE_CHILDREN)
  cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
  return {"until": (until or end) / 60, "end": end / 60, "cpu": cpu / 60}


def table(times: dict[str, dict[str, float]], commit: str) -> str:
  """Returns the block of the page."""
  lines = [
    f"Written by `python -m tests.first_hour --write` at commit {commit}, on {os.cpu_count()} "
    "CPU cores, installation left out.",
    "",
    "| step | goal | minutes until then | minutes until its commands end | CPU minutes |",
    "| --- | --- | --- | --- | --- |",
  ]
  for number, promise in PROMISES.items():
    if str(number) in times:
      row = times[str(number)]
      lines.append(
        f"| {number}: {promise.text} | {promise.goal} | {row['until']:.1f} | "
        f"{row['end']:.1f} | {row['cpu']:.1f} |"
      )
  return "\n".join(lines)


def _clone(folder: pathlib.Path) -> pathlib.Path:
  """Returns the clone in a folder, which is made if it is not there."""
  clone = folder / "r3jax"
  if not clone.exists():
    command = ["git", "clone", "--quiet", "--no-hardlinks", ROOT, clone]
    subprocess.run(command, check=True)
  return clone


def _environment(
  clone: pathlib.Path, python: pathlib.Path | None
) -> dict[str, str]:
  """Returns the variables of the commands: caches in the clone, and the r3jax of a Python."""
  environment = dict(os.environ)
  environment.pop("PYTHONPATH", None)
  programs = clone / ".venv" / "bin"
  if python:
    programs = python.absolute().parent
    environment["PYTHONPATH"] = "."  # the clone's r3jax, whichever is installed
  environment["PATH"] = f"{programs}:{environment['PATH']}"
  environment["JAX_COMPILATION_CACHE_DIR"] = str(clone / "cache" / "jax")
  environment["R3JAX_DATA"] = str(clone / "cache" / "data")
  return environment


def main() -> None:
  """Runs the steps that the command line names."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--out", required=True, type=pathlib.Path)
  parser.add_argument("--steps", default=",".join(map(str, PROMISES)))
  parser.add_argument("--python", type=pathlib.Path)
  parser.add_argument("--write", action="store_true")
  arguments = parser.parse_args()
  folder = arguments.out.resolve()
  folder.mkdir(parents=True, exist_ok=True)
  clone = _clone(folder)
  page = steps((clone / PAGE).read_text())
  environment = _environment(clone, arguments.python)
  if not arguments.python and not (clone / ".venv").exists():
    install = ["bash", "-e", "-c", page[0].commands]
    subprocess.run(install, cwd=clone, check=True)
  times_file = folder / "times.json"
  times = json.loads(times_file.read_text()) if times_file.exists() else {}
  for number in map(int, arguments.steps.split(",")):
    log = folder / f"step_{number}.log"
    promise = PROMISES[number]
    try:
      times[str(number)] = run(
        page[number], clone, log, environment, promise.pattern
      )
    except RuntimeError as error:
      sys.exit(f"step {number}: {error}")
    times_file.write_text(json.dumps(times, indent=1) + "\n")
  commit = subprocess.check_output(
    ["git", "-C", clone, "rev-parse", "--short=10", "HEAD"], text=True
  ).strip()
  content = table(times, commit)
  print(content)
  if arguments.write:
    target = ROOT / PAGE
    target.write_text(
      seed_table.replace_block(target.read_text(), _BLOCK, content)
    )


if __name__ == "__main__":
  main()

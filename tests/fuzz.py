"""Tries the readers of `tests/hostile.py` with new inputs, for as long as it is told.

  python -m tests.fuzz --minutes 10 --target all --seed 0

Each target runs in a process of its own, in which an example may take so many seconds and so much
memory. The first example that fails, hangs or crashes the process is printed, as small as it can be
made; it belongs into a test. The exit code is the number of targets that failed.
"""

import argparse
import os
import pathlib
import resource
import signal
import subprocess
import sys
import tempfile
import time

import hypothesis

_SECONDS = 10  # of an example
_MEMORY = 2 * 2**30  # bytes beyond what the process has at its start
_ROUND = 200  # examples between two looks at the clock
_GRACE = (
  600.0  # seconds for the start, the last round and making an example small
)


class _Hangs(Exception):
  """An example takes too long."""


def _stop(number, frame):
  raise _Hangs(f"an example must take at most {_SECONDS} s")


def _limit_memory() -> None:
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
  size = pages * resource.getpagesize() + _MEMORY
  resource.setrlimit(resource.RLIMIT_AS, (size, size))


def fuzz(name: str, seconds: float, seed: int, last: pathlib.Path) -> int:
  """Tries inputs of a target; returns how many.

  Args:
    name: Of the target.
    seconds: For how long.
    seed: Of the first round.
    last: File for the example that is being tried, which tells what crashed the process.
  """
  from tests import hostile

  target = hostile.TARGETS[name]
  end = time.monotonic() + seconds
  count = 0
  signal.signal(signal.SIGALRM, _stop)
  _limit_memory()

  def check(drawn):
    nonlocal count
    count += 1
    last.write_text(repr(drawn))
    signal.setitimer(signal.ITIMER_REAL, _SECONDS)
    try:
      target.check(drawn)
    finally:
      signal.setitimer(signal.ITIMER_REAL, 0)

  settings = hypothesis.settings(
    max_examples=_ROUND,
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
  )
  while time.monotonic() < end:
    run = settings(hypothesis.given(target.inputs)(check))
    hypothesis.seed(seed)(run)()
    seed += 1
  return count


def _in_child(name: str, minutes: float, seed: int) -> bool:
  """Fuzzes a target in a process of its own; prints a line, and what failed."""
  with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
    last = pathlib.Path(folder) / "last"
    command = [sys.executable, "-m", "tests.fuzz", "--child", str(last)]
    command += ["--target", name, "--minutes", str(minutes)]
    command += ["--seed", str(seed)]
    log = pathlib.Path(folder) / "log"
    with log.open("w") as output:
      child = subprocess.Popen(command, stdout=output, stderr=output)
      try:
        code = child.wait(60 * minutes + _GRACE)
      except subprocess.TimeoutExpired:
        # A signal does not reach Python while a library hangs.
        child.kill()
        code = child.wait()
    text = log.read_text(errors="replace")
    if code == 0:
      print(f"{name}: {text.strip().splitlines()[-1]}", flush=True)
      return True
    print(f"{name}: FAILED with exit code {code}")
    print(text[-6000:])
    if last.exists():
      print(f"the last example: {last.read_text()[:4000]}", flush=True)
    return False


def main() -> None:
  """Fuzzes what the command line names."""
  from tests import hostile

  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--minutes", type=float, default=10.0)
  parser.add_argument("--target", default="all", help="or names with commas")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--child", help="file of the last example; internal")
  arguments = parser.parse_args()
  if arguments.child:
    seconds = 60 * arguments.minutes
    last = pathlib.Path(arguments.child)
    count = fuzz(arguments.target, seconds, arguments.seed, last)
    print(f"{count} examples")
    return
  names = arguments.target.split(",")
  if names == ["all"]:
    names = list(hostile.TARGETS)
  unknown = set(names) - hostile.TARGETS.keys()
  if unknown:
    parser.error(f"--target must be among {sorted(hostile.TARGETS)}")
  failed = [
    name
    for name in names
    if not _in_child(name, arguments.minutes, arguments.seed)
  ]
  sys.exit(len(failed))


if __name__ == "__main__":
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  main()

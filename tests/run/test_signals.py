"""Tests of runs that are asked to end: signals at random moments, one process and two.

python -m pytest -m slow tests/run/test_signals.py     some 40 minutes on two cores
"""

import dataclasses
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from r3jax.evaluation import sample_log
from r3jax.files import jsonl
from r3jax.parallel import preemption
from tests import tiny

ROOT = pathlib.Path(__file__).parents[2]
MOMENTS = 20  # of each signal, and each number of processes
CHANGES = {
  "total_steps": 20,
  "eval.every": 10,
  "checkpoint.every": 5000,
  "preemption.grace_s": 60.0,
}
# A signal before that finds a process that has not begun to listen.
START_SECONDS = 1.5
JOIN_SECONDS = 120.0
HAS_JOINED = "Gloo"  # what a process writes when it is connected to the other
AT_ONCE_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class End:
  """How a run ended after a signal.

  Attributes:
    moment: Seconds from when the run could be asked to the signal.
    seconds: Seconds from the signal to the end of the last process.
    codes: Exit codes of the processes.
    text: What they wrote.
  """

  moment: float
  seconds: float
  codes: list[int]
  text: str

  @property
  def was_at_once(self) -> bool:
    # One of two may have entered an iteration that the other has not: then neither finishes it.
    return "nothing has to be saved" in self.text or "is not saved" in self.text


class Runs:
  """Starts a command in a folder, again and again."""

  def __init__(
    self,
    model: pathlib.Path,
    folder: pathlib.Path,
    count: int,
    script: str = "launch/tpu.py",
  ):
    self.workdir = folder / "workdir"
    self._script = script
    self._model = model
    self._folder = folder
    self._count = count

  def start(self) -> list[subprocess.Popen]:
    """Starts all processes."""
    with socket.socket() as probe:
      probe.bind(("127.0.0.1", 0))
      port = probe.getsockname()[1]
    return [self._start_one(i, port) for i in range(self._count)]

  def _start_one(self, process: int, port: int) -> subprocess.Popen:
    settings = tiny.settings(self._model) | CHANGES
    settings["mesh.data"] = self._count
    command = [
      sys.executable,
      self._script,
      "--config=tests/parallel/caching_config.py:shapes",
      f"--workdir={self.workdir}",
    ]
    command += [f"--config.{key}={value}" for key, value in settings.items()]
    if self._count > 1:
      command += [
        f"--coordinator=127.0.0.1:{port}",
        f"--num_processes={self._count}",
        f"--process_id={process}",
      ]
    flags = re.sub(
      r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"]
    )
    environment = os.environ | {
      "PYTHONPATH": str(ROOT),
      "XLA_FLAGS": flags,
      "JAX_NUM_CPU_DEVICES": "1",
    }
    with self.log(process).open("w") as log:
      return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=log, stderr=log
      )

  def log(self, process: int) -> pathlib.Path:
    return self._folder / f"{process}.log"

  def text(self) -> str:
    """Returns what the last start wrote."""
    return "\n".join(self.log(i).read_text() for i in range(self._count))

  def finish(self) -> float:
    """Runs to the end; returns the seconds since the run could be asked."""
    processes = self.start()
    start = self._when_it_can_be_asked(processes)
    codes = [process.wait(900) for process in processes]
    assert codes == [0] * self._count, self.text()
    return time.monotonic() - start

  def _when_it_can_be_asked(self, processes: list[subprocess.Popen]) -> float:
    """Waits until the processes of a start listen to signals together; returns the time.

    A process that ends before all have joined ends alone: the others do not know of it, and wait
    for it as long as for one that is late.
    """
    if self._count == 1:
      time.sleep(START_SECONDS)
      return time.monotonic()
    start = time.monotonic()
    while not all(
      HAS_JOINED in self.log(i).read_text() for i in range(self._count)
    ):
      if all(process.poll() is not None for process in processes):
        break
      assert time.monotonic() - start < JOIN_SECONDS, self.text()
      time.sleep(0.01)
    return time.monotonic()

  def interrupt(
    self, moment: float, number: signal.Signals, to: int
  ) -> End | None:
    """Starts, and sends a signal to one process; returns None if it ended before."""
    processes = self.start()
    start = self._when_it_can_be_asked(processes)
    while time.monotonic() - start < moment:
      time.sleep(0.01)
      if all(process.poll() is not None for process in processes):
        assert [process.returncode for process in processes] == (
          [0] * self._count
        ), self.text()
        return None
    processes[to].send_signal(number)
    asked = time.monotonic()
    codes = [process.wait(120) for process in processes]
    return End(moment, time.monotonic() - asked, codes, self.text())


def _check(end: End, summary: pathlib.Path) -> None:
  """Checks that a run ended as documented."""
  assert "Traceback" not in end.text, end.text
  if set(end.codes) == {0}:  # in its last moments
    assert summary.exists(), end.text
    return
  assert set(end.codes) == {preemption.EXIT_CODE}, end
  assert "the same command continues" in end.text, end.text
  if end.was_at_once:
    assert end.seconds < AT_ONCE_SECONDS, end
  else:
    assert "saved after iteration" in end.text, end.text
    assert end.seconds < CHANGES["preemption.grace_s"], end


def _without_seconds(row: dict) -> dict:
  return {
    name: value
    for name, value in row.items()
    if "seconds" not in name and not name.startswith("perf/")
  }


def _numbers(workdir: pathlib.Path) -> dict:
  """Returns all numbers and texts of a run."""
  numbers = {}
  for name in ("metrics.jsonl", "evaluation.jsonl"):
    rows = jsonl.read(workdir / name)
    numbers[name] = [_without_seconds(row) for row in rows]
  for folder in (
    *sorted((workdir / "evaluation").iterdir()),
    workdir / "report",
  ):
    samples = []
    for sample in sample_log.read(folder):
      turns = [
        _without_seconds(dataclasses.asdict(turn)) for turn in sample.turns
      ]
      samples.append(dataclasses.asdict(sample) | {"turns": turns})
    numbers[folder.name] = samples
  return numbers


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("count", [1, 2], scope="class")
class TestRandomMoments:
  @pytest.fixture(scope="class")
  @classmethod
  def whole(cls, tiny_model, tmp_path_factory, count):
    """The numbers of an uninterrupted run, and how long its second start takes."""
    folder = tmp_path_factory.mktemp(f"whole_{count}")
    Runs(tiny_model, folder, count).finish()  # fills the cache
    seconds = Runs(tiny_model, folder / "again", count)
    (folder / "again").mkdir()
    return _numbers(folder / "workdir"), seconds.finish()

  @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
  def test_runs_end_as_documented_and_resume_to_the_same_numbers(
    self, whole, tiny_model, tmp_path, count, number
  ):
    numbers, seconds = whole
    generator = random.Random(f"{count} {number}")
    ends = []
    workdirs = 0
    while len(ends) < MOMENTS:
      folder = tmp_path / str(workdirs)
      folder.mkdir()
      workdirs += 1
      runs = Runs(tiny_model, folder, count)
      while len(ends) < MOMENTS:
        moment = generator.uniform(0, seconds)
        end = runs.interrupt(moment, number, generator.randrange(count))
        if end is None:
          break
        print(
          f"{number.name} to 1 of {count} after {moment:.1f} s: {end.codes} in "
          f"{end.seconds:.1f} s, {'at once' if end.was_at_once else 'saved'}",
          flush=True,
        )
        _check(end, runs.workdir / "summary.json")
        ends.append(end)
      runs.finish()
      assert _numbers(runs.workdir) == numbers
    assert any(not end.was_at_once for end in ends)


@pytest.mark.slow
@pytest.mark.timeout(1200)
class TestEvaluate:
  def test_one_of_two_that_is_asked_ends_both_and_they_resume(
    self, tiny_model, tmp_path
  ):
    runs = Runs(tiny_model, tmp_path, 2, "launch/evaluate.py")
    processes = runs.start()
    while not (runs.workdir / "samples.jsonl").exists():
      assert all(process.poll() is None for process in processes), runs.text()
      time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    asked = time.monotonic()
    codes = [process.wait(60) for process in processes]
    end = End(0.0, time.monotonic() - asked, codes, runs.text())
    _check(end, runs.workdir / "summary.json")
    written = sample_log.read(runs.workdir)
    runs.finish()
    assert sample_log.read(runs.workdir)[: len(written)] == written
    assert (runs.workdir / "summary.json").exists()


# Runs the command of `gcloud ... ssh --worker=all` in the home of every host.
GCLOUD = """#!/usr/bin/env bash
for word in "$@"; do
  case $word in --command=*) command=${word#--command=} ;; esac
done
status=0
for home in "$HOSTS"/*/; do (cd "$home" && bash -c "$command") || status=1; done
exit $status
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
class TestStop:
  def test_script_of_the_pod_ends_a_run_of_two_processes(
    self, tiny_model, tmp_path
  ):
    (tmp_path / "gcloud").write_text(GCLOUD)
    (tmp_path / "gcloud").chmod(0o755)
    runs = Runs(tiny_model, tmp_path, 2)
    processes = runs.start()
    for number, process in enumerate(processes):
      home = tmp_path / "hosts" / str(number) / "r3jax"
      home.mkdir(parents=True)
      (home / "run.pid").write_text(str(process.pid))
      # A process that nobody waits for would stay in the table of processes.
      threading.Thread(target=process.wait, daemon=True).start()
    while not (runs.workdir / "metrics.jsonl").exists():
      assert all(process.poll() is None for process in processes), runs.text()
      time.sleep(0.01)
    environment = os.environ | {
      "PATH": f"{tmp_path}:{os.environ['PATH']}",
      "HOSTS": str(tmp_path / "hosts"),
      "PROJECT": "p",
    }
    script = ["bash", "launch/pod/queued_resources.sh", "stop"]
    stop = subprocess.run(script, cwd=ROOT, env=environment, check=False)
    codes = [process.poll() for process in processes]
    assert (stop.returncode, codes) == (0, [75, 75]), runs.text()
    assert "saved after iteration" in runs.text()
    assert "Traceback" not in runs.text()

"""Tests of two processes of which one meets a fault, in every phase of the main job.

python -m pytest -m slow tests/parallel/test_faults_of_one_process.py

Some 45 starts; both processes keep what they have compiled, see `caching_config.py`. `-k "killed
and 1"` and the like choose one kind and process.
"""

import dataclasses
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from r3jax.evaluation import sample_log
from r3jax.files import jsonl
from tests import soak
from tests import tiny

ROOT = pathlib.Path(__file__).parents[2]
# From the end of one process to that of the other: JAX misses a silent one after 100 s.
END_SECONDS = 100
ABORTED = -signal.SIGABRT
# In the second iteration of a start, so that a step has been timed.
PHASES = {"rollout": 2, "update": 3, "save": 4, "evaluation": 4}
CHANGES = {
  "total_steps": 5,
  "checkpoint.every": 1,
  "eval.every": 2,
  "eval.rounds": 2,
  "eval.batch_size": 2,
  "log.tensorboard": False,
}


@dataclasses.dataclass(frozen=True)
class End:
  """How processes ended.

  Attributes:
    codes: Their exit codes.
    seconds: From the first end to the last.
    texts: What they wrote.
  """

  codes: list[int | None]
  seconds: float
  texts: list[str]


class Runs:
  """Starts a command again and again in one workdir.

  Attributes:
    workdir: Of the run.
  """

  def __init__(
    self,
    model: pathlib.Path,
    folder: pathlib.Path,
    count: int = 2,
    command: str = "train",
  ):
    """Starts `count` processes each time."""
    folder.mkdir(parents=True, exist_ok=True)
    self.workdir = folder / "workdir"
    self._model = model
    self._folder = folder
    self._count = count
    self._command = command

  def _start(self, process: int, port: int, fault: tuple, changes: dict):
    settings = tiny.settings(self._model) | CHANGES
    settings |= {"mesh.data": self._count} | changes
    command = [
      sys.executable,
      "-m",
      "tests.parallel.faulty_job",
      *map(str, fault),
      self._command,
      "--config=tests/parallel/caching_config.py:shapes",
      f"--workdir={self.workdir}",
      *(f"--config.{key}={value}" for key, value in settings.items()),
    ]
    if self._count > 1:
      command += [
        f"--coordinator=127.0.0.1:{port}",
        f"--num_processes={self._count}",
        f"--process_id={process}",
      ]
    environment = os.environ | {
      "PYTHONPATH": str(ROOT),
      "JAX_NUM_CPU_DEVICES": "1",
      "XLA_FLAGS": os.environ["XLA_FLAGS"].replace(
        "--xla_force_host_platform_device_count=8", ""
      ),
    }
    if settings.get("model.dtype") == "float64":
      environment["JAX_ENABLE_X64"] = "1"
    log = self._folder / f"{process}.log"
    with log.open("w") as file:
      return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=file, stderr=file
      )

  def run(self, fault: tuple = ("none", "", 0, 0), **changes) -> End:
    """Runs all processes to their ends."""
    with socket.socket() as probe:
      probe.bind(("127.0.0.1", 0))
      port = probe.getsockname()[1]
    processes = [
      self._start(i, port, fault, changes) for i in range(self._count)
    ]
    try:
      first = None
      while any(process.poll() is None for process in processes):
        if first is None and any(
          process.poll() is not None for process in processes
        ):
          first = time.monotonic()
        if first and time.monotonic() - first > 2 * END_SECONDS:
          break
        time.sleep(0.05)
      seconds = time.monotonic() - (first or time.monotonic())
    finally:
      for process in processes:
        process.kill()
    texts = [
      (self._folder / f"{i}.log").read_text() for i in range(self._count)
    ]
    codes = [process.wait() for process in processes]
    return End(codes, seconds, texts)

  def finish(self, **changes) -> None:
    """Runs to the end."""
    end = self.run(**changes)
    assert end.codes == [0] * self._count, "\n".join(end.texts)


def check(end: End, how: str, phase: str, process: int) -> None:
  """Checks how a run ended in which one process met a fault."""
  text = end.texts[process]
  other_text = end.texts[1 - process]
  shown = "\n".join(end.texts)
  assert end.seconds < END_SECONDS, shown
  assert "Traceback" not in other_text, other_text
  if how == "killed":
    assert end.codes[process] == -signal.SIGKILL, shown
    if process == 0:
      # JAX aborts the others when its coordination service is gone, if it is faster than ours.
      assert end.codes[1] in (1, ABORTED), shown
      assert (
        "processes [0] do not answer" in other_text
        or "JAX distributed service detected fatal errors" in other_text
      ), other_text
      return
    assert end.codes[0] == 1, shown
    assert "processes [1] do not answer" in other_text, other_text
    return
  assert end.codes == [1, 1], shown
  assert f"process {process} failed, and ends this one" in other_text, shown
  if how == "raises":
    assert f"Planted: in {phase}" in text, text
    assert f"Planted: in {phase}" in other_text, other_text
    return
  assert "Traceback" not in text, text
  if phase == "save":
    assert "a checkpoint could not be written to" in text, text
  else:
    assert "there must be room for what is written" in text, text
    assert f"DISK/{phase}" in other_text, other_text


def samples(folder: pathlib.Path) -> list[dict]:
  """Returns the samples of an evaluation without the times."""
  rows = [dataclasses.asdict(sample) for sample in sample_log.read(folder)]
  for row in rows:
    for turn in row["turns"]:
      turn["seconds"] = None
  return rows


def assert_same_run(workdir: pathlib.Path, other: pathlib.Path) -> None:
  """Checks that two finished runs have the same numbers, to the last digit."""
  assert soak.differences(workdir, other) == []
  steps = [row["step"] for row in jsonl.read(workdir / "metrics.jsonl")]
  assert steps == list(range(1, CHANGES["total_steps"] + 1))
  for folder in sorted((other / "evaluation").iterdir()):
    mine = workdir / "evaluation" / folder.name
    assert samples(mine) == samples(folder), folder.name
  assert samples(workdir / "report") == samples(other / "report")


@pytest.fixture(name="whole", scope="module")
def fixture_whole(tiny_model, tmp_path_factory):
  """The workdir of two processes that met no fault."""
  runs = Runs(tiny_model, tmp_path_factory.mktemp("whole"))
  runs.finish()
  return runs.workdir


@pytest.mark.slow
@pytest.mark.timeout(7200)
class TestTraining:
  @pytest.mark.parametrize("process", [0, 1])
  @pytest.mark.parametrize("how", ["killed", "raises", "full"])
  def test_both_end_and_resume_to_the_same_numbers(
    self, tiny_model, tmp_path, whole, how, process
  ):
    runs = Runs(tiny_model, tmp_path)
    for phase, number in PHASES.items():
      end = runs.run((how, phase, number, process))
      print(f"{how}, {phase}, process {process}: {end.codes}, the other after")
      print(f"  {end.seconds:.1f} s")
      check(end, how, phase, process)
    runs.finish()
    assert_same_run(runs.workdir, whole)


@pytest.mark.slow
@pytest.mark.timeout(3600)
class TestNoIteration:
  @pytest.mark.parametrize("count", [1, 2])
  def test_evaluates_and_reports(self, tiny_model, tmp_path, count):
    runs = Runs(tiny_model, tmp_path, count)
    runs.finish(total_steps=0)
    assert (runs.workdir / "summary.json").exists()
    assert (runs.workdir / "report" / "index.html").exists()
    assert len(samples(runs.workdir / "evaluation" / "step_000000")) == 6


@pytest.mark.slow
@pytest.mark.timeout(3600)
class TestEvaluate:
  def test_two_resume_after_a_kill_to_the_numbers_of_one(
    self, tiny_model, tmp_path
  ):
    # In float32 the order of additions is seen.
    exact = {"model.dtype": "float64"}
    alone = Runs(tiny_model, tmp_path / "alone", 1, "evaluate")
    alone.finish(**exact)
    for process in (0, 1):
      runs = Runs(tiny_model, tmp_path / str(process), 2, "evaluate")
      end = runs.run(("killed", "evaluation", 0, process), **exact)
      check(end, "killed", "evaluation", process)
      runs.finish(**exact)
      assert samples(runs.workdir) == samples(alone.workdir)
      assert (runs.workdir / "summary.json").exists()

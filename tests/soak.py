r"""Trains under random faults, then compares every number with an uninterrupted run's.

  python -m tests.soak --minutes=60 --seed=0 --reward=world --out=DIR
  python -m tests.soak --minutes=60 --faults=kill --count=25 --out=DIR

A tiny model trains by the main job on one device. Again and again, at a random moment, one of the
FAULTS happens, and the job is started once more with the same command. Numbers that break at fixed
iterations are planted in both runs (`tests/soak_job.py`). At the end the run that was interrupted
is compared with one that was not: metrics, evaluations and parameters must be equal to the last
digit. --faults draws some of the faults only, without damage between the starts, and --count ends
after so many.
DIR gets events.jsonl, the log of every start, resources.csv (memory, threads and file descriptors
of the uninterrupted run), resources.png and result.json. As root the workdir is a small file system
of its own, which a fault can fill up.

The exit code is 1 where numbers differ, a start printed a traceback, hung or ended with a code that
docs/checkpoints.md does not name.
"""

import argparse
import collections
from collections.abc import Sequence
import contextlib
import csv
import json
import math
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
from matplotlib import figure
import numpy as np
import orbax.checkpoint as ocp

from r3jax.checkpoint import training
from r3jax.files import jsonl
from r3jax.rewards import outcome
from r3jax.rewards.serving import server
from tests import tiny

ROOT = pathlib.Path(__file__).parents[1]
# Faults and how often they are drawn.
FAULTS = {
  "kill": 4,
  "terminate": 3,
  "interrupt": 3,
  "ask twice": 1,
  "second job": 1,
  "fill the disk": 2,
  "reward is down": 2,
}
ASKED_TO_END = 75
_START_SECONDS = 600  # until a start has done an iteration
_END_SECONDS = 90  # from a signal to the end
_DISK = "96m"
_CHECKPOINT_EVERY = 5
_COMMON = {
  "checkpoint.every": _CHECKPOINT_EVERY,
  "checkpoint.keep": 3,
  "eval.every": 40,
  "log.tensorboard": False,
  "log.samples_every": 20,
}
_SERVICE = {
  "reward.name": "service",
  # Every outage of the soak ends within them: no score is missing.
  "reward.client.attempts": 400,
  "reward.client.deadline": 120.0,
  "reward.client.pause": 0.05,
  "reward.client.failures_to_open": 1_000_000,
}
_ITERATION = re.compile(r"iteration (\d+)/")


class Redness:
  """A reward that any image has; see `outcome.HostReward`."""

  parts = ("strict",)

  def check(self, prompt) -> None:
    """Accepts every prompt."""

  def score(self, images, prompts) -> list[outcome.Outcome]:
    """Scores images by their first channel."""
    outcomes = []
    for image, prompt in zip(images, prompts, strict=True):
      value = tiny.redness(image, prompt)
      outcomes.append(outcome.Ok(value, {"strict": float(value == 1)}, {}))
    return outcomes

  def describe(self) -> dict:
    """Returns the name."""
    return {"model": "redness"}

  def metrics(self) -> dict[str, float]:
    """Returns no metrics."""
    return {}


class FragileServer(server.Server):
  """A reward server that turns requests away, answers nonsense, and is down for a while."""

  def __init__(self, seed: int):
    """Binds a free port of this host."""
    super().__init__(("127.0.0.1", 0), Redness())
    self._random = random.Random(seed)
    self.down_until = 0.0

  @property
  def url(self) -> str:
    """The address."""
    return f"http://127.0.0.1:{self.server_address[1]}"

  def admit(self) -> bool:
    """Turns away one request in ten, and all while it is down."""
    if time.monotonic() < self.down_until or self._random.random() < 0.1:
      return False
    return super().admit()

  def reply(self, request_id, items) -> bytes:
    """Answers one request in twenty with nonsense."""
    if self._random.random() < 0.05:
      return b'{"protocol": 1, "outcomes": [[[['
    return super().reply(request_id, items)


class Job:
  """One start of the main job."""

  def __init__(self, command: list[str], environment: dict, log: pathlib.Path):
    """Starts the process; its output goes to `log`."""
    self.log = log
    with log.open("w") as file:
      self.process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=file, stderr=file
      )

  def text(self) -> str:
    """Returns what it has printed."""
    return self.log.read_text(errors="replace")

  def has_iterated(self) -> bool:
    """Returns whether an iteration of this start is done."""
    return bool(_ITERATION.search(self.text()))

  def wait_until_iterating(self) -> bool:
    """Waits for the first iteration; returns whether it came."""
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end and self.process.poll() is None:
      if self.has_iterated():
        return True
      time.sleep(0.2)
    return False

  def runs_for(self, seconds: float) -> bool:
    """Returns whether the process still runs after a time."""
    with contextlib.suppress(subprocess.TimeoutExpired):
      self.process.wait(seconds)
    return self.process.returncode is None

  def end(self, seconds: float = _END_SECONDS) -> int | str:
    """Returns the exit code; "hung" for one that had to be killed."""
    if not self.runs_for(seconds):
      return self.process.returncode
    self.process.kill()
    self.process.wait()
    return "hung"


class Soak:
  """A run under faults.

  Attributes:
    problems: what must not have happened, a line each.
    counts: events by name.
  """

  def __init__(
    self,
    out: pathlib.Path,
    reward: str,
    seed: int,
    faults: Sequence[str] = tuple(FAULTS),
  ):
    """Writes the model; starts the reward server where one is asked for."""
    self.out = out
    self._faults = faults
    self.problems: list[str] = []
    self.counts: collections.Counter[str] = collections.Counter()
    self._random = random.Random(seed)
    self._seed = seed
    self._model = out / "model"
    tiny.write_model(self._model)
    self._num_starts = 0
    self.server = None
    if reward == "service":
      self.server = FragileServer(seed)
      threading.Thread(target=self.server.serve_forever, daemon=True).start()

  def start(self, workdir: pathlib.Path, total_steps: int, name: str) -> Job:
    """Starts the main job."""
    changes = tiny.settings(self._model) | _COMMON
    changes |= {"total_steps": total_steps, "seed": self._seed}
    if self.server:
      changes |= _SERVICE | {"reward.endpoints": (self.server.url,)}
    command = [
      sys.executable,
      "-m",
      "tests.soak_job",
      "--config=r3_geneval:shapes",
      f"--workdir={workdir}",
      *(f"--config.{key}={value}" for key, value in changes.items()),
    ]
    environment = os.environ | {
      "PYTHONPATH": str(ROOT),
      "JAX_PLATFORMS": "cpu",
      "JAX_NUM_CPU_DEVICES": "1",
      # The planted faults are part of the program: a cache of its own.
      "JAX_COMPILATION_CACHE_DIR": str(self.out / "compiled"),
      "R3JAX_DATA": str(self.out / "data"),
      "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false",
    }
    self._num_starts += 1
    log = self.out / f"start_{self._num_starts:03d}_{name}.log"
    return Job(command, environment, log)

  def note(self, event: str, **facts) -> None:
    """Counts an event and writes it to events.jsonl."""
    self.counts[event] += 1
    line = {"step": self._num_starts, "event": event, "time": time.time()}
    jsonl.append(self.out / "events.jsonl", [line | facts])
    print(event, facts, flush=True)

  def refuse(self, job: Job, problem: str) -> None:
    """Notes what must not happen."""
    self.problems.append(f"{job.log.name}: {problem}")
    self.note("PROBLEM", problem=problem, log=job.log.name)

  def check(self, job: Job, code: int | str, allowed: set) -> None:
    """Checks how a start has ended."""
    text = job.text()
    if code not in allowed:
      self.refuse(job, f"ended with {code}, allowed are {allowed}")
    if "Traceback (most recent call last)" in text:
      self.refuse(job, "a traceback")
    self.counts["fell back"] += len(re.findall(r"it is moved to", text))

  # --- Faults ----------------------------------------------------------------

  def one_fault(self, workdir: pathlib.Path, total_steps: int) -> None:
    """Starts the job, lets one fault happen, and waits for the end of the start."""
    impossible = set()
    if not self.server:
      impossible.add("reward is down")
    if not workdir.is_mount():
      impossible.add("fill the disk")
    names = [name for name in self._faults if name not in impossible]
    weights = [FAULTS[name] for name in names]
    (fault,) = self._random.choices(names, weights)
    job = self.start(workdir, total_steps, fault.replace(" ", "_"))
    is_early = self._random.random() < 0.25
    if is_early and fault in ("kill", "terminate", "interrupt", "ask twice"):
      job.runs_for(self._random.uniform(1, 30))
    elif not job.wait_until_iterating():
      self.refuse(job, f"no iteration; exit code {job.end(1)}")
      return
    else:
      job.runs_for(self._random.uniform(0, 15))
    if job.process.poll() is not None:
      self.refuse(job, f"ended by itself with {job.process.returncode}")
      return
    done = _ITERATION.findall(job.text())
    start = time.monotonic()
    getattr(self, f"_{fault.replace(' ', '_')}")(job, workdir, total_steps)
    self.note(
      fault,
      iteration=int(done[-1]) if done else None,
      code=job.process.returncode,
      seconds=round(time.monotonic() - start, 2),
    )

  def _kill(self, job: Job, workdir, total_steps) -> None:
    del workdir, total_steps
    job.process.kill()
    self.check(job, job.end(), {-signal.SIGKILL})

  def _ask(self, job: Job, signals: list[signal.Signals]) -> None:
    was_iterating = job.has_iterated()
    # Python itself may still be starting, where nobody listens.
    is_loading = "r3jax" not in job.text()
    for number in signals:
      job.process.send_signal(number)
      job.runs_for(0.3)
    allowed = {ASKED_TO_END}
    if is_loading and not was_iterating:
      allowed |= {-signals[0], 1}
    self.check(job, job.end(), allowed)

  def _terminate(self, job: Job, workdir, total_steps) -> None:
    del workdir, total_steps
    self._ask(job, [signal.SIGTERM])

  def _interrupt(self, job: Job, workdir, total_steps) -> None:
    del workdir, total_steps
    self._ask(job, [signal.SIGINT])

  def _ask_twice(self, job: Job, workdir, total_steps) -> None:
    del workdir, total_steps
    self._ask(job, [signal.SIGTERM, signal.SIGTERM])

  def _second_job(self, job: Job, workdir, total_steps) -> None:
    second = self.start(workdir, total_steps, "second")
    code = second.end(300)
    self.check(second, code, {1})
    if job.process.poll() is not None:
      self.refuse(job, "ended when a second job was started")
    job.process.kill()
    self.check(job, job.end(), {-signal.SIGKILL})

  def _fill_the_disk(
    self, job: Job, workdir: pathlib.Path, total_steps
  ) -> None:
    del total_steps
    filler = workdir / "filler"
    with contextlib.suppress(OSError), filler.open("wb") as file:
      while True:
        file.write(bytes(2**16))
        file.flush()
    # It either ends with a message, or goes on until it is asked to end.
    if job.runs_for(_END_SECONDS):
      filler.unlink()
      self._ask(job, [signal.SIGTERM])
      return
    self.check(job, job.process.returncode, {1})
    filler.unlink()

  def _reward_is_down(self, job: Job, workdir, total_steps) -> None:
    del workdir, total_steps
    seconds = self._random.uniform(2, 20)
    self.server.down_until = time.monotonic() + seconds
    if not job.runs_for(seconds + 5):
      self.refuse(job, "ended in an outage that its retries outlast")
      return
    self._ask(job, [signal.SIGINT])

  def damage(self, workdir: pathlib.Path) -> None:
    """Damages the newest of several checkpoints, or a small file, between two starts."""
    checkpoints = sorted(
      (
        path
        for path in (workdir / "checkpoints").glob("*")
        if path.name.isdecimal()
      ),
      key=lambda path: int(path.name),
    )
    if len(checkpoints) > 1 and self._random.random() < 0.4:
      files = [path for path in checkpoints[-1].rglob("*") if path.is_file()]
      file = self._random.choice(files)
      kind = self._random.choice(["cut", "flip", "delete"])
      content = bytearray(file.read_bytes())
      if kind == "delete":
        file.unlink()
      elif kind == "cut":
        file.write_bytes(content[: len(content) // 2])
      elif content:
        content[self._random.randrange(len(content))] ^= 1 << 4
        file.write_bytes(content)
      self.note(
        "damaged checkpoint",
        kind=kind,
        file=str(file.relative_to(workdir)),
      )
    if self._random.random() < 0.2:
      metrics = workdir / "metrics.jsonl"
      if metrics.exists():
        with metrics.open("a") as file:
          file.write('{"step": 9')
      foreign = workdir / "evaluation" / "notes"
      foreign.mkdir(parents=True, exist_ok=True)
      (foreign / "summary.json").write_text("not ours")
      self.note("damaged small files")
    for moved in (workdir / "checkpoints").glob("*.damaged*"):
      shutil.rmtree(moved)

  # --- The two runs ------------------------------------------------------------

  def num_faults(self) -> int:
    """Returns how many faults have happened."""
    return sum(self.counts[name] for name in FAULTS)

  def run_under_faults(
    self, workdir: pathlib.Path, minutes: float, count: float
  ) -> int:
    """Lets faults happen until the time is over; returns the iterations that are done.

    Args:
      workdir: Of the run.
      minutes: The time.
      count: After so many faults it is over, too.
    """
    end = time.monotonic() + 60 * minutes
    while time.monotonic() < end and self.num_faults() < count:
      self.one_fault(workdir, 1_000_000)
      if set(self._faults) == set(FAULTS):
        self.damage(workdir)
    return max(line["step"] for line in _whole_lines(workdir / "metrics.jsonl"))

  def finish(self, workdir: pathlib.Path, total_steps: int) -> None:
    """Lets a run end by itself."""
    job = self.start(workdir, total_steps, "finish")
    self.check(job, job.end(7200), {0})

  def run_without_faults(self, workdir: pathlib.Path, total_steps: int) -> None:
    """Runs from start to end; writes memory, threads and file descriptors."""
    job = self.start(workdir, total_steps, "uninterrupted")
    with (self.out / "resources.csv").open("w") as file:
      rows = csv.writer(file)
      rows.writerow(["iteration", "resident_mib", "threads", "descriptors"])
      while job.runs_for(2.0):
        iterations = _ITERATION.findall(job.text())
        with contextlib.suppress(OSError):  # it may just have ended
          rows.writerow(
            [int(iterations[-1]) if iterations else 0, *_resources(job)]
          )
    self.check(job, job.process.returncode, {0})


def plot(out: pathlib.Path) -> None:
  """Draws DIR/resources.csv as DIR/resources.png, from the first iteration on."""
  names, *rows = csv.reader((out / "resources.csv").read_text().splitlines())
  numbers = np.array(rows, float)
  numbers = numbers[numbers[:, 0] > 0]
  size = {"figsize": (6.4, 4.8), "layout": "constrained", "dpi": 110}
  chart = figure.Figure(**size)
  for i, axes in enumerate(chart.subplots(3, 1, sharex=True), start=1):
    axes.plot(numbers[:, 0], numbers[:, i])
    axes.set_ylim(0, 1.2 * numbers[:, i].max())
    axes.set_ylabel(names[i].replace("_mib", ", MiB"))
    axes.grid(alpha=0.3)
  axes.set_xlabel("iteration")
  chart.savefig(out / "resources.png")


def _resources(job: Job) -> tuple[float, int, int]:
  """Returns resident MiB, threads and file descriptors of a process."""
  folder = pathlib.Path(f"/proc/{job.process.pid}")
  status = dict(
    line.split(":", 1) for line in (folder / "status").read_text().splitlines()
  )
  resident = int(status["VmRSS"].split()[0]) / 1024
  return (
    round(resident, 1),
    int(status["Threads"]),
    len(list((folder / "fd").iterdir())),
  )


def _whole_lines(path: pathlib.Path) -> list[dict]:
  """Returns the objects of a log that a kill may have cut."""
  *lines, _ = path.read_text().split("\n")
  return [json.loads(line) for line in lines]


def _numbers(path: pathlib.Path) -> dict[int, dict]:
  """Returns the lines of a log by step, without what depends on time and machine."""
  lines = {}
  for line in jsonl.read(path):
    lines[line["step"]] = {
      name: value
      for name, value in line.items()
      if not name.startswith(("seconds/", "perf/", "service/"))
    }
  return lines


def _arrays(workdir: pathlib.Path) -> list[np.ndarray]:
  """Returns the arrays of the last checkpoint, read by plain Orbax."""
  path = (
    workdir
    / "checkpoints"
    / str(training.latest_step(workdir / "checkpoints"))
    / "state"
  )
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    tree = checkpointer.metadata(path).item_metadata.tree
    as_numpy = jax.tree.map(
      lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree
    )
    restored = checkpointer.restore(
      path, args=ocp.args.PyTreeRestore(restore_args=as_numpy)
    )
  return [np.asarray(leaf) for leaf in jax.tree.leaves(restored)]


def differences(first: pathlib.Path, second: pathlib.Path) -> list[str]:
  """Returns what differs between two finished runs, a line each."""
  lines = []
  for name in ("metrics.jsonl", "evaluation.jsonl"):
    ours, theirs = _numbers(first / name), _numbers(second / name)
    if ours.keys() != theirs.keys():
      lines.append(f"{name}: {len(ours)} steps, {len(theirs)} steps")
    for step in sorted(ours.keys() & theirs.keys()):
      for key in sorted(ours[step].keys() | theirs[step].keys()):
        a, b = ours[step].get(key), theirs[step].get(key)
        if a != b:
          lines.append(f"{name}: step {step}, {key}: {a} and {b}")
  for i, (a, b) in enumerate(zip(_arrays(first), _arrays(second), strict=True)):
    if not np.array_equal(a, b):
      lines.append(f"array {i} of the last checkpoint")
  return lines


@contextlib.contextmanager
def small_disk(folder: pathlib.Path):
  """Makes a folder a small file system of its own where this process may; a plain one elsewhere."""
  folder.mkdir(parents=True)
  mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK}", "tmpfs", str(folder)]
  if os.geteuid() or subprocess.run(mount, check=False).returncode:
    print("the workdir is no file system of its own: no disk is filled up")
    yield
    return
  try:
    yield
  finally:
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def main() -> int:
  """Runs the soak; returns the exit code."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--minutes", type=float, default=60.0)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--reward", choices=["world", "service"], default="world")
  parser.add_argument(
    "--faults", nargs="+", choices=list(FAULTS), default=list(FAULTS)
  )
  parser.add_argument("--count", type=int, default=math.inf)
  parser.add_argument("--out", type=pathlib.Path, required=True)
  arguments = parser.parse_args()
  arguments.out.mkdir(parents=True)
  soak = Soak(arguments.out, arguments.reward, arguments.seed, arguments.faults)
  faulty = arguments.out / "disk"
  with small_disk(faulty):
    num_iterations = soak.run_under_faults(
      faulty, arguments.minutes, arguments.count
    )
    soak.finish(faulty, num_iterations)
    kept = arguments.out / "interrupted"
    shutil.copytree(faulty, kept)
  uninterrupted = arguments.out / "uninterrupted"
  soak.run_without_faults(uninterrupted, num_iterations)
  plot(arguments.out)

  different = differences(kept, uninterrupted)
  skipped = sum(
    line.get("optimizer/skipped", 0)
    for line in jsonl.read(uninterrupted / "metrics.jsonl")
  )
  result = {
    "seed": arguments.seed,
    "reward": arguments.reward,
    "minutes": arguments.minutes,
    "iterations": num_iterations,
    "faults": {name: soak.counts[name] for name in FAULTS},
    "events": dict(soak.counts),
    "skipped updates": skipped,
    "differences": len(different),
    "first differences": different[:20],
    "problems": soak.problems,
  }
  (arguments.out / "result.json").write_text(
    json.dumps(result, indent=1) + "\n"
  )
  print(json.dumps(result, indent=1))
  return int(bool(different or soak.problems))


if __name__ == "__main__":
  sys.exit(main())

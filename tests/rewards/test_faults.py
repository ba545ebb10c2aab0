"""R3 runs with a reward service in another process that fails in every way we could think of.

The step is compiled once; every run starts from the same state. The slow tests run 20 iterations
per fault, the quick one three of a few faults.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

from etils import epath
import httpx
import jax
import numpy as np
import pytest

from configs import r3_geneval
from r3jax.checkpoint import training
from r3jax.files import jsonl
from r3jax.parallel import meshes
from r3jax.rewards import registry
from r3jax.rewards.from_host import budget
from r3jax.rl import train_state
from r3jax.run import loop
from r3jax.run import sessions
from r3jax.run import workdir as workdir_lib
from r3jax.run.logging import metric_writer
from r3jax.run.logging import sinks
from r3jax.run.logging import timing
from r3jax.worlds.shapes import verifier
from tests import documented
from tests import tiny
from tests.rewards import faulty_server

ROOT = pathlib.Path(__file__).parents[2]
FAULTS = faulty_server.FAULTS[1:]
HARMLESS = ("slow",)  # slow replies are in time: nothing is lost
IMAGES = 8  # of a stage: 2 groups of 4, sent two by two
CLIENT = {
  "deadline": 0.8,
  "attempts": 1,
  "pause": 0.02,
  "concurrency": 8,
  "failures_to_open": 1000,
  "open_seconds": 0.1,
}


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


class Service:
  """The faulty server's process, which can be killed and started again at the same port."""

  def __init__(self, bomb: pathlib.Path):
    self.bomb, self.port, self.process = bomb, free_port(), None
    self.url = f"http://127.0.0.1:{self.port}"
    self.start()

  def start(self):
    command = [
      sys.executable,
      "tests/rewards/faulty_server.py",
      str(self.port),
      str(self.bomb),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    self.process = subprocess.Popen(
      command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert self.process.stdout.readline() == "ready\n"

  def kill(self):
    self.process.send_signal(signal.SIGKILL)
    self.process.wait()

  def behave(self, fault: str, share: float = 1.0):
    httpx.post(
      f"{self.url}/fault/{fault}/{share}", content=b"", trust_env=False
    )


@dataclasses.dataclass
class Bench:
  """A compiled step whose rewards come from the service."""

  service: Service
  session: sessions.Session
  policy: dict
  step: object
  settings: dict

  def run(
    self, workdir: pathlib.Path, iterations: int, before=None, **reward
  ) -> train_state.TrainState:
    """Runs iterations in a new workdir; checks that every score is the verifier's, or missing.

    Args:
      workdir: gets the run's files.
      iterations: total_steps.
      before: called with the number of every iteration before it.
      reward: changes of the config's section.
    """
    config = tiny.make_config(
      self.session.experiment.pretrained.folder,
      self.settings | {"total_steps": iterations, "checkpoint.every": 1000},
    )
    config.reward.update(reward)
    config.lock()
    session = dataclasses.replace(
      self.session,
      config=config,
      files=workdir_lib.Workdir(epath.Path(workdir)),
    )
    session.experiment.reward.log_to(session.files.rewards, 0)
    session.experiment.reward.metrics()  # forgets what went before
    number = iter(range(1, 1000))

    def step(state, rows):
      if before:
        before(next(number))
      state, metrics, samples = self.step(state, rows)
      check_scores(session, rows, samples)
      return state, metrics, samples

    with jax.set_mesh(session.mesh):
      return loop.iterate(
        session,
        step,
        loop.resume(session, session.init(self.policy)),
        timing.PhaseClock(),
        metric_writer.MetricWriter(sinks.open_all(session.files.path, None)),
      )


class Broken:
  """A reward with a bug."""

  parts = ("correct", "strict", "clutter")

  def score(self, images, prompts):
    raise ZeroDivisionError("a bug")

  def metrics(self):
    return {}


def check_scores(session, rows, samples):
  """Asserts that scores which are there are those of the images, and that missing ones are NaN."""
  size, edits = session.experiment.settings.group_size, samples.edits
  for score, images, taken in (
    (samples.draft_score, samples.drafts.rollout.images, np.repeat(rows, size)),
    (samples.edit_score, edits.refined.images, rows[edits.prompt_index]),
  ):
    records = [session.experiment.train[row] for row in taken]
    truth = np.asarray(
      verifier.verify(images, verifier.encode_records(records)).value
    )
    value, valid = np.asarray(score.value), np.asarray(score.valid)
    np.testing.assert_array_equal(value[valid], truth[valid])
    assert np.isnan(value[~valid]).all()


@pytest.fixture(scope="module")
def bench(tiny_model, tmp_path_factory):
  folder = tmp_path_factory.mktemp("faults")
  service = Service(folder / "bomb")
  settings = tiny.settings(tiny_model) | {
    "reward.name": "service",
    "reward.endpoints": (service.url,),
    "reward.batch": 2,
    "reward.cache": 0,
    "log.samples_every": 0,
    **{f"reward.client.{key}": value for key, value in CLIENT.items()},
  }
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      meshes,
      "make_mesh",
      lambda **shape: meshes.make_mesh_on(jax.devices()[:1], **shape),
    )
    session, policy = sessions.prepare(
      tiny.make_config(tiny_model, settings), str(folder / "workdir")
    )
  with jax.set_mesh(session.mesh):
    step = session.compile(session.init(policy))
  made = Bench(service, session, policy, step, settings)
  yield made
  service.kill()
  assert not service.bomb.exists()  # nothing that came over the wire was run


def outcomes(workdir: pathlib.Path) -> dict[str, int]:
  """Returns how many images got which status, from the run's log."""
  (path,) = (workdir / "rewards").iterdir()
  statuses = [line["status"] for line in jsonl.read(path)]
  return {
    status: statuses.count(status) for status in ("ok", "failed", "invalid")
  }


def images_sent(rows: list[dict]) -> float:
  """Returns how many images are scored in iterations with these metrics.

  These are all drafts, and all edits but those that keep their source image.
  """
  return sum(IMAGES * (1 + row["edit/edit_rate"]) for row in rows)


def check_partial(
  bench: Bench, workdir: pathlib.Path, fault: str, iterations: int
) -> dict:
  """Runs with every second request failing; returns figures for the log."""
  start = time.monotonic()
  bench.service.behave(fault, 0.5)
  state = bench.run(workdir, iterations, max_failed_fraction=1.0)
  seconds = time.monotonic() - start
  rows = jsonl.read(workdir / "metrics.jsonl")
  assert len(rows) == iterations
  documented.check(
    {name for name in rows[0] if name.startswith("service/")}, "service"
  )
  counted, logged = (
    outcomes(workdir),
    sum(row["service/service/images_failed"] for row in rows),
  )
  num_sent = images_sent(rows)
  assert iterations * IMAGES < num_sent <= iterations * 2 * IMAGES
  assert sum(counted.values()) == num_sent
  assert counted["failed"] == logged
  assert counted["failed"] == pytest.approx(
    0 if fault in HARMLESS else num_sent / 2, abs=4
  )
  for row in rows:
    assert all(
      value is not None for name, value in row.items() if name.endswith("loss")
    )
  moved = jax.tree.leaves(
    jax.tree.map(
      lambda x, y: float(abs(x - y).max()), state.policy, bench.policy
    )
  )
  assert max(moved) > 0  # what was scored has trained
  valid = float(np.mean([row["reason/valid"] for row in rows]))
  return {
    "fault": fault,
    "ok": counted["ok"],
    "failed": counted["failed"],
    "reason/valid": round(valid, 3),
    "seconds": round(seconds, 1),
  }


def check_complete(bench: Bench, workdir: pathlib.Path, fault: str) -> dict:
  """Runs with every request failing; the run must stop at the budget, saved."""
  start = time.monotonic()
  bench.service.behave(fault)
  with pytest.raises(
    budget.BudgetExceeded, match="See to the reward service and start again"
  ):
    bench.run(workdir, 20, max_failed_fraction=0.15, failure_window=20)
  assert outcomes(workdir)["ok"] == 0
  stopped = len(jsonl.read(workdir / "metrics.jsonl"))
  assert stopped == 4  # 4 of 20 is beyond 0.15
  assert training.latest_step(workdir / "checkpoints") == 4
  return {
    "fault": fault,
    "stopped after": stopped,
    "seconds": round(time.monotonic() - start, 1),
  }


class TestQuick:
  @pytest.mark.parametrize("fault", ["error500", "dropped", "pickle"])
  def test_half_of_the_requests_fail(self, bench, tmp_path, fault):
    check_partial(bench, tmp_path, fault, 3)

  def test_all_requests_fail(self, bench, tmp_path, caplog):
    with caplog.at_level("INFO", logger="absl"):
      check_complete(bench, tmp_path, "garbage")
    lines = [line for line in caplog.messages if line.startswith("iteration ")]
    assert len(lines) == 4
    for line in lines:
      assert "draft missing  edited missing" in line and "nan" not in line
      assert "100.0% of the images have no score: service: " in line
      assert len(line) < 400

  def test_bug_in_the_reward_ends_the_run(self, bench, tmp_path, monkeypatch):
    scorer = bench.session.experiment.reward.scorers["service"]
    monkeypatch.setattr(scorer, "_reward", Broken())
    with pytest.raises(ZeroDivisionError, match="a bug"):
      bench.run(tmp_path, 3)
    scorer.error = None
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
class TestTwentyIterations:
  @pytest.mark.parametrize("fault", FAULTS)
  def test_half_of_the_requests_fail(self, bench, tmp_path, fault):
    print(check_partial(bench, tmp_path, fault, 20))

  @pytest.mark.parametrize(
    "fault", [fault for fault in FAULTS if fault not in HARMLESS]
  )
  def test_all_requests_fail(self, bench, tmp_path, fault):
    print(check_complete(bench, tmp_path, fault))

  def test_default_client_loses_next_to_nothing(
    self, bench, tmp_path, monkeypatch
  ):
    section = bench.session.config.reward.copy_and_resolve_references()
    with section.unlocked():
      section.client = r3_geneval.get_config("shapes").reward.client
    reward = registry.build(section).scorers["service"]._reward
    monkeypatch.setattr(
      bench.session.experiment.reward.scorers["service"], "_reward", reward
    )
    bench.service.behave("error500", 0.5)
    bench.run(tmp_path, 20)
    rows = jsonl.read(tmp_path / "metrics.jsonl")
    counted, retries = (
      outcomes(tmp_path),
      sum(row["service/service/retries"] for row in rows),
    )
    print(counted, {"retries": retries})
    assert counted["ok"] >= 0.95 * images_sent(rows) and retries > 20

  def test_server_is_killed_and_started_again(self, bench, tmp_path):
    bench.service.behave("none")

    def before(number):
      if number == 6:
        bench.service.kill()
      if number == 9:
        bench.service.start()

    bench.run(tmp_path, 20, before, max_failed_fraction=0.2)
    rows = jsonl.read(tmp_path / "metrics.jsonl")
    valid = [row["reason/valid"] for row in rows]
    assert valid == [1.0] * 5 + [0.0] * 3 + [1.0] * 12
    assert outcomes(tmp_path) == {
      "ok": images_sent(rows[:5] + rows[8:]),
      "failed": images_sent(rows[5:8]),
      "invalid": 0,
    }

  def test_every_endpoint_is_down(self, bench, tmp_path):
    bench.service.behave("none")
    with contextlib.ExitStack() as stack:
      stack.callback(bench.service.start)
      with pytest.raises(budget.BudgetExceeded):
        bench.run(
          tmp_path,
          20,
          lambda number: bench.service.kill() if number == 3 else None,
          max_failed_fraction=0.15,
        )
    valid = [
      row["reason/valid"] for row in jsonl.read(tmp_path / "metrics.jsonl")
    ]
    assert valid == [1.0] * 2 + [0.0] * 4


@pytest.mark.slow
@pytest.mark.timeout(1800)
class TestTwoProcesses:
  def test_they_go_on_or_stop_together(self, tiny_model, tmp_path):
    """The service of process 1 fails every request; later a bug breaks its reward."""
    services = [Service(tmp_path / f"bomb{i}") for i in range(2)]
    services[1].behave("error500")
    coordinator = f"127.0.0.1:{free_port()}"
    environment = os.environ | {
      "PYTHONPATH": str(ROOT),
      "XLA_FLAGS": os.environ["XLA_FLAGS"].replace(
        "device_count=8", "device_count=1"
      ),
    }
    processes = [
      subprocess.Popen(
        [
          sys.executable,
          "tests/rewards/two_processes.py",
          str(i),
          coordinator,
          str(tiny_model),
          str(tmp_path / "workdir"),
          services[i].url,
        ],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
      for i in range(2)
    ]
    try:
      printed = [process.communicate(timeout=900) for process in processes]
    finally:
      for process in processes:
        process.kill()
      for service in services:
        service.kill()
    assert [process.returncode for process in processes] == [0, 0], (
      printed[0][1][-2000:] + printed[1][1][-2000:]
    )
    one, two = (json.loads(output.splitlines()[-1]) for output, _ in printed)
    assert one["goes on"]["ended"] == two["goes on"]["ended"] == "finished"
    assert one["goes on"]["policy"] == two["goes on"]["policy"]
    assert one["stops"] == two["stops"]
    assert one["stops"]["ended"] == "BudgetExceeded"
    assert one["stops"]["says"].startswith(
      "images without a score must be at most 0.1 of those of 10 iterations"
    )
    assert two["breaks"] == {
      "ended": "ZeroDivisionError",
      "says": "integer division or modulo by zero",
    }
    assert (
      one["breaks"]["ended"] == "RuntimeError"
      and "processes [1] failed" in one["breaks"]["says"]
    )

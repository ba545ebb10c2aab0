"""Tests of the main job with a workdir in an object store; the model is left out."""

import dataclasses
import json
import re
import time
import types

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import r3_geneval
from r3jax.checkpoint import training
from r3jax.data import contamination
from r3jax.data import records
from r3jax.evaluation import sample_log
from r3jax.files import config_guard
from r3jax.files import jsonl
from r3jax.parallel import preemption
from r3jax.rewards import combine
from r3jax.rewards import outcome
from r3jax.rewards.from_host import scorer
from r3jax.rl import train_state
from r3jax.run import loop
from r3jax.run import sessions
from r3jax.run import workdir as workdir_lib
from tests.evaluation import fakes

PROMPTS = tuple(records.Prompt("colors", f"prompt {i}") for i in range(4))
CALLS = 3  # of the reward in an iteration, as from as many devices
STEPS = 7


class Power(Exception):
  """It went off."""


class Answers:
  """A host reward that gives a long answer about every image."""

  parts = ("strict",)

  def check(self, record):
    del record

  def score(self, images, prompts):
    return [
      outcome.Ok(0.5, {"strict": 0.0}, {"answer": "x" * 1000}) for _ in prompts
    ]

  def describe(self):
    return {"model": "m"}

  def metrics(self):
    return {}


@dataclasses.dataclass
class Session:
  """What `loop.run` needs of a session; an iteration adds 1 to the only parameter.

  Attributes:
    fails_at: iteration in which the power goes off.
    asked_at: iteration in which the process is asked to end.
  """

  config: object
  files: workdir_lib.Workdir
  fails_at: int | None = None
  asked_at: int | None = None

  def __post_init__(self):
    self.identity = {"seed": 0}
    self.mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    self.frozen = train_state.Frozen({}, None)
    self._scorer = scorer.Scorer(Answers())
    reward = combine.on_host("judge", self._scorer)
    self.experiment = types.SimpleNamespace(
      train=PROMPTS,
      heldout=PROMPTS,
      contamination=contamination.Contamination({}),
      reward=reward,
      evaluation_reward=reward,
      world=None,
    )
    settings = types.SimpleNamespace(
      num_groups=1, group_size=2, num_reflect_rounds=0
    )
    self.stages = types.SimpleNamespace(settings=settings)
    self._rows = self._scorer.encode(PROMPTS)
    self.leaked = contamination.Leaked({}, True)
    self.evaluation = dataclasses.replace(
      fakes.evaluation(fakes.Sampler(20)), flush=self._ask_and_flush
    )

  def _ask(self):
    for row in self._rows[:CALLS]:
      self._scorer._score(np.zeros((1, 4, 4, 3), np.uint8), [row])

  def init(self, policy):
    return train_state.TrainState(policy, (), jnp.int32(0))

  def compile(self, state):
    del state

    def step(state, rows):
      del rows
      self._ask()
      number = int(state.step) + 1
      if number == self.fails_at:
        # A dead process writes no more; this one must have written its checkpoint before that.
        while not training.latest_step(self.files.checkpoints):
          time.sleep(0.01)
        raise Power
      if number == self.asked_at:
        preemption.ENDING.ask("SIGTERM")
      state = state.replace(
        policy=jax.tree.map(lambda x: x + 1, state.policy),
        step=jnp.int32(number),
      )
      metrics = {
        "reason/score": number / 100,
        "reason/valid": 1.0,
        "reason/tokens": 7.0,
      }
      return state, metrics, {}

    return step

  def _ask_and_flush(self):
    self._ask()
    self.experiment.reward.raise_together()

  evaluate, _evaluate = sessions.Session.evaluate, sessions.Session._evaluate


def _start(workdir: str, total_steps: int = STEPS, **changes) -> dict:
  """Starts the job as `launch/tpu.py` does, without what a model takes."""
  config = r3_geneval.get_config("shapes")
  config.total_steps = total_steps
  config.groups_per_step = 2
  config.checkpoint.every = 3
  config.eval.every = 4
  config.log.samples_every = 2
  if total_steps:
    config.profile.update(start=2, steps=1)
  files = workdir_lib.Workdir(epath.Path(workdir))
  sessions.check(config, files)
  config_guard.check_writable(workdir, "workdir")
  config_guard.write_or_check(workdir, config.to_dict(), sessions.MAY_DIFFER)
  return loop.run(Session(config, files, **changes), {"x": jnp.float32(0)})


def _logs(folder: epath.Path) -> dict[str, list[dict]]:
  """Returns the logs without times."""
  kinds = ("samples.jsonl", "rewards/judge.0.jsonl")
  evaluations = [
    f"evaluation/step_{step:06d}/{kind}"
    for step in (0, 4, STEPS)
    for kind in kinds
  ]
  names = (
    "metrics.jsonl",
    "evaluation.jsonl",
    "rewards/judge.0.jsonl",
    "report/samples.jsonl",
    *evaluations,
  )

  def drop(row):
    return {
      name: value
      for name, value in row.items()
      if not re.match("seconds/|perf/|time|turns", name)
    }

  return {
    name: [drop(row) for row in jsonl.read(folder / name)] for name in names
  }


class TestRun:
  @pytest.fixture(autouse=True)
  def around(self, store, tmp_path, monkeypatch):
    """Only checkpoints, which Orbax writes by libraries of its own, are on the disk."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
      workdir_lib.Workdir,
      "checkpoints",
      property(
        lambda files: epath.Path(tmp_path / "checkpoints" / files.path.name)
      ),
    )
    # its iterations have no samples
    monkeypatch.setattr(loop.host_metrics, "compute", lambda *_: {})
    image = np.zeros((2, 2, 3), np.uint8)
    turn = sample_log.Turn(
      image="", score=0.5, text="t", instruction="", stop=False
    )

    def shown(experiment, step, *_):
      sample = sample_log.Sample(
        step=step, key=f"{step}", prompt="p", tag="colors", turns=(turn,)
      )
      return [loop.report_samples.ReportSample(sample, [image], PROMPTS[0])]

    monkeypatch.setattr(loop.report_samples, "first_samples", shown)
    yield
    assert [
      path.name
      for path in tmp_path.iterdir()
      if path.name not in ("checkpoints", "local")
    ] == []

  def test_no_object_is_written_more_than_twice(self, store):
    _start("gs://bucket/run")
    assert max(store.writes.values()) <= 2, store.writes.most_common(3)
    logged = [name for name in store.writes if ".parts/" in name]
    # Metrics, answers of the judge, samples; of three evaluations numbers, answers and samples.
    assert len(logged) == STEPS + STEPS + 4 + 3 + 3 + 3
    names = {name.removeprefix("gs://bucket/run/") for name in store.objects}
    assert {
      "config.json",
      "summary.json",
      "report/index.html",
      "evaluation/step_000000/summary.json",
      "evaluation/step_000004/index.html",
      "evaluation/step_000007/summary.json",
      "evaluation/step_000007/images/00000_00_0.png",
    } <= names
    assert any(
      re.fullmatch(r"profile/plugins/profile/\w+/.*\.xplane\.pb", name)
      for name in names
    )
    assert not [
      name
      for name in names
      if name.endswith((".new", ".partial")) or "probe" in name
    ]

  def test_logs_are_those_of_a_disk(self, tmp_path):
    _start("gs://bucket/run")
    _start(str(tmp_path / "local"))
    found = _logs(epath.Path("gs://bucket/run"))
    assert found == _logs(epath.Path(tmp_path / "local"))
    assert [row["step"] for row in found["metrics.jsonl"]] == list(
      range(1, STEPS + 1)
    )
    assert [row["step"] for row in found["rewards/judge.0.jsonl"]] == [
      i for i in range(1, STEPS + 1) for _ in range(CALLS)
    ]

  def test_resumed_run_is_an_uninterrupted_one(self, store):
    whole = _start("gs://bucket/whole")
    with pytest.raises(Power):
      _start("gs://bucket/broken", fails_at=6)
    assert [
      row["step"] for row in jsonl.read("gs://bucket/broken/metrics.jsonl")
    ] == [1, 2, 3, 4, 5]
    resumed = _start("gs://bucket/broken")
    folders = [
      epath.Path(f"gs://bucket/{name}") for name in ("whole", "broken")
    ]
    assert _logs(folders[0]) == _logs(folders[1])
    assert resumed["scores"] == whole["scores"]
    assert (
      json.loads((folders[1] / "summary.json").read_text())["iterations"]
      == STEPS
    )
    assert max(store.writes.values()) <= 4  # two starts

  @pytest.mark.parametrize("asked_at", [5, STEPS])
  def test_run_that_is_asked_to_end_saves_and_resumes(
    self, monkeypatch, tmp_path, asked_at
  ):
    codes = []
    monkeypatch.setattr(
      preemption, "ENDING", preemption.Ending(exit_process=codes.append)
    )
    _start("gs://bucket/whole")
    with pytest.raises(SystemExit) as end:
      _start("gs://bucket/asked", asked_at=asked_at)
    assert (end.value.code, codes) == (preemption.EXIT_CODE, [])
    assert training.latest_step(tmp_path / "checkpoints/asked") == asked_at
    monkeypatch.setattr(preemption, "ENDING", preemption.Ending())
    _start("gs://bucket/asked")
    whole = _logs(epath.Path("gs://bucket/whole"))
    assert _logs(epath.Path("gs://bucket/asked")) == whole

  def test_run_without_iterations_has_a_report(self):
    summary = _start("gs://bucket/none", total_steps=0)
    assert summary["iterations"] == 0
    assert epath.Path("gs://bucket/none/report/index.html").exists()

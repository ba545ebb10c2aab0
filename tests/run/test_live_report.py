"""Tests of run/live_report.py."""

import dataclasses
import json

from etils import epath
import ml_collections
import numpy as np
import pytest

from r3jax.evaluation import sample_log
from r3jax.evaluation import summary as evaluation_summary
from r3jax.report import evaluation_report
from r3jax.rl import stage_outputs
from r3jax.run import live_report
from r3jax.run import loop
from r3jax.run import machine
from r3jax.run import sessions
from r3jax.run import summary
from r3jax.run import workdir
from tests import tiny


@dataclasses.dataclass(frozen=True)
class FakeSession:
  """What the report reads of a session where it does not write the page itself."""

  config: ml_collections.ConfigDict


def fake_session(samples_every: int) -> FakeSession:
  return FakeSession(
    ml_collections.ConfigDict({"log": {"samples_every": samples_every}})
  )


class Run:
  """A run whose iterations take a second, and whose pages take `seconds`."""

  def __init__(self, samples_every: int, seconds: float):
    self.now = 0.0
    self.written = []
    self.report = live_report.LiveReport(
      fake_session(samples_every), self._write, lambda: self.now
    )
    self._seconds = seconds

  def _write(self, number: int) -> None:
    self.written.append(number)
    self.now += self._seconds

  def iterate(self, first: int, last: int) -> None:
    for number in range(first, last + 1):
      self.now += 1.0
      self.report.update(number)


class TestLiveReport:
  def test_page_is_there_after_the_first_iteration_of_every_start(self):
    run = Run(samples_every=5, seconds=0.01)
    run.iterate(7, 20)
    assert run.written == [7, 10, 15, 20]

  def test_pages_cost_less_than_a_hundredth(self):
    run = Run(samples_every=5, seconds=0.5)
    run.iterate(1, 1000)
    assert run.written[:3] == [1, 55, 105]
    share = 0.5 * (len(run.written) - 1) / run.now
    assert share < 0.01

  def test_page_is_kept_up_to_date_without_samples(self):
    run = Run(samples_every=0, seconds=0.0)
    run.iterate(1, 20)
    assert run.written == [1, 10, 20]


class TestStart:
  def test_says_how_the_run_was_started(self, monkeypatch):
    arguments = ["r3jax train", "--workdir=a run", "--config=c"]
    monkeypatch.setattr(machine.sys, "argv", arguments)
    start = machine.start()
    assert start["command"] == "r3jax train '--workdir=a run' --config=c"
    assert set(start) == {"command", "commit", "date", "machine"}
    assert "cpu" in start["machine"]


def _evaluated(step: int) -> list[sample_log.Sample]:
  """Returns the samples of six prompts, which are right after training."""
  score = 1.0 if step else 0.5
  samples = []
  for number in range(6):
    turn = sample_log.EvaluatedTurn(
      image=f"images/{number}.png",
      score=score,
      text="<think> red </think>",
      instruction="",
      stop=False,
      parts={"strict": score},
      format=1.0,
      tokens=4,
      chain_score=score,
      says_stop=False,
      instruction_tokens=0,
      seconds=10.0,
    )
    samples.append(
      sample_log.Sample(
        step=step,
        key=str(number),
        prompt=f"ring {number}",
        tag="colors",
        turns=(turn, turn),
      )
    )
  return samples


class TestRun:
  """The whole run around a scripted step and a scripted evaluation."""

  @pytest.fixture
  def session(self, tiny_model, tmp_path, monkeypatch):
    changes = {
      "total_steps": 3,
      "reflect_rounds": 0,
      "log.samples_every": 0,
      "log.tensorboard": False,
    }
    bench = tiny.make_bench(tiny_model, changes=changes)
    files = workdir.Workdir(epath.Path(tmp_path))
    drafts = tiny.drafts(bench)
    scores = tiny.brightness(drafts.rollout.images, None)
    samples = stage_outputs.Samples(drafts, scores, None, None)

    def step(state, indices):
      """Changes nothing; gives the numbers that the log needs."""
      del indices
      metrics = {
        "reason/skipped": np.float32(0),
        "reason/valid": np.float32(1),
        "reason/score": np.float32(0.25),
        "reason/tokens": np.float32(7),
      }
      return dataclasses.replace(state, step=state.step + 1), metrics, samples

    def evaluate(session, policy, number, writer):
      """Writes the summary of scripted samples."""
      del policy, writer
      chains = _evaluated(number)
      context = evaluation_summary.Context(
        "t", number, session.leaked, (1.0, 1.0), 0
      )
      folder = session.files.evaluation(number)
      folder.mkdir(parents=True, exist_ok=True)
      evaluation_report.conclude(folder, chains, context)
      return sessions.Evaluated(chains, [])

    monkeypatch.setattr(sessions.Session, "evaluate", evaluate)
    monkeypatch.setattr(sessions.Session, "compile", lambda *_: step)
    return dataclasses.replace(bench.session, files=files), bench.policy

  def test_page_goes_along_and_a_second_start_keeps_the_times(
    self, session, tmp_path, monkeypatch, caplog
  ):
    session, policy = session
    pages = []
    write_page = summary.write_page

    def watched(*arguments, **named):
      """Writes the page, and keeps its text."""
      write_page(*arguments, **named)
      pages.append((tmp_path / "report" / "index.html").read_text())

    monkeypatch.setattr(summary, "write_page", watched)
    with caplog.at_level("INFO", logger="absl"):
      first = loop.run(session, policy)
    during, after = pages
    assert "Iteration 1 of 3, written 20" in during
    assert "../evaluation/step_000000/index.html" in during
    assert "step_000003" not in during
    assert "Iteration" not in after
    assert "../evaluation/step_000003/index.html" in after
    # all prompts changed alike, so that there is no verdict
    assert "+0.500 [+0.500, +0.500]</p>" in after and "6 prompts" in after
    lines = [line for line in caplog.messages if line.startswith("iteration ")]
    assert lines[0].endswith("ETA after the next")
    assert "draft 0.250" in lines[0] and "edited" not in lines[0]
    # of the evaluation after the last iteration: 6 samples of two rounds
    assert lines[2].endswith("ETA 0:02:00")

    second = loop.run(session, policy)
    for name in ("seconds", "compile_seconds", "peak_memory_gib", "start"):
      assert second[name] == first[name]
    assert (
      json.loads((tmp_path / "summary.json").read_text())["seconds"]
      == (first["seconds"])
    )

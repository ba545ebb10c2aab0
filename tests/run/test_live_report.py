"""Tests of run/live_report.py."""

import dataclasses

import ml_collections

from r3jax.run import live_report
from r3jax.run import machine


@dataclasses.dataclass(frozen=True)
class Session:
  """What the report reads of a session where it does not write the page itself."""

  config: ml_collections.ConfigDict


def session(samples_every: int) -> Session:
  return Session(
    ml_collections.ConfigDict({"log": {"samples_every": samples_every}})
  )


class Run:
  """A run whose iterations take a second, and whose pages take `seconds`."""

  def __init__(self, samples_every: int, seconds: float):
    self.now = 0.0
    self.written = []
    self.report = live_report.LiveReport(
      session(samples_every), self._write, lambda: self.now
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

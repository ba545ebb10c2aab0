"""Tests of parallel/agreement.py: processes, here threads, that end after the same iteration."""

import threading

import pytest

from r3jax.parallel import agreement
from r3jax.parallel import preemption


class Service:
  """The folders of the coordination service, which all processes share."""

  def __init__(self):
    self._texts = {}
    self._lock = threading.Lock()

  def write(self, process: int, folder: str, text: str) -> None:
    with self._lock:
      self._texts[folder, process] = text

  def write_first(self, key: str, text: str) -> str:
    with self._lock:
      return self._texts.setdefault((key, 0), text)

  def read(self, folder: str) -> dict[int, str]:
    with self._lock:
      return {
        process: text
        for (name, process), text in self._texts.items()
        if name == folder
      }


class Process:
  """A process of a run, whose iterations the test steps through."""

  def __init__(self, number: int):
    self.number = number
    self.codes = []
    self.ending = preemption.Ending(exit_process=self._exit)
    self.ending.join_others()
    self.block_has_ended = threading.Event()
    self.thread = threading.Thread(target=self._agree)

  def _exit(self, code: int) -> None:
    self.codes.append(code)
    self.block_has_ended.set()

  def _agree(self) -> None:
    THIS.number = self.number
    agreement._agree(self.ending, self.block_has_ended)


THIS = threading.local()


@pytest.fixture(name="processes")
def fixture_processes(monkeypatch):
  """Two processes that talk through a service."""
  service = Service()
  monkeypatch.setattr(
    agreement.multihost,
    "write_text",
    lambda folder, text="": service.write(THIS.number, folder, text),
  )
  monkeypatch.setattr(agreement.multihost, "write_first", service.write_first)
  monkeypatch.setattr(agreement.multihost, "read_texts", service.read)
  monkeypatch.setattr(agreement.jax, "process_count", lambda: 2)
  monkeypatch.setattr(agreement.jax, "process_index", lambda: THIS.number)
  monkeypatch.setattr(agreement, "_LOOK_SECONDS", 0.01)
  monkeypatch.setattr(agreement, "_POLL_SECONDS", 0.01)
  monkeypatch.setattr(agreement, "_LAST_SECONDS", 0.01)
  processes = [Process(0), Process(1)]
  for process in processes:
    process.thread.start()
  yield processes
  for process in processes:
    process.block_has_ended.set()
    process.thread.join()


def test_both_end_after_the_iteration_of_the_one_ahead(processes):
  first, second = processes
  first.ending.will_save(4)
  second.ending.will_save(5)
  first.ending.ask("SIGTERM")
  assert not first.ending.is_due(4)
  assert first.ending.is_due(5) and second.ending.is_due(5)
  assert second.ending.wait_until_asked(0) == "process 0"


def test_both_end_at_once_where_one_evaluates(processes):
  first, second = processes
  first.ending.will_save(4)
  second.ending.ask("SIGTERM")
  for process in processes:
    process.thread.join(10)
    assert process.codes == [75]


def test_one_that_leaves_later_ends_the_other_too(processes):
  first, second = processes
  for process in processes:
    process.ending.will_save(4)
  first.ending.ask("SIGTERM")
  assert first.ending.is_due(4) and second.ending.is_due(4)
  second.ending.end_at_once()  # a second signal, or the grace is over
  for process in processes:
    process.thread.join(10)
    assert process.codes == [75]


def test_nobody_ends_where_nobody_asks(processes):
  for process in processes:
    process.ending.will_save(4)
    assert not process.ending.is_due(4)
    process.block_has_ended.set()
    process.thread.join(10)
    assert process.codes == []


def test_process_that_does_not_answer_is_not_waited_for(processes, monkeypatch):
  monkeypatch.setattr(agreement, "_FAREWELL_SECONDS", 0.05)
  first, second = processes
  second.block_has_ended.set()
  second.thread.join(10)
  first.ending.ask("SIGTERM")
  first.thread.join(10)
  assert first.codes == [75]

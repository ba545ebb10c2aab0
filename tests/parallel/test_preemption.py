"""Tests of parallel/preemption.py: when a process ends after it was asked to."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from r3jax.parallel import preemption

ROOT = pathlib.Path(__file__).parents[2]
# Stands for a compilation: no bytecode of the main thread runs, the GIL is free.
BLOCKED = """
import ctypes, signal, sys
from r3jax.parallel import preemption
preemption.ENDING.grace_seconds = 1.0
if len(sys.argv) > 2:
  signal.signal(signal.SIGHUP, getattr(signal, sys.argv[2]))
preemption.ENDING.listen("the same command continues")
if sys.argv[1] == "iteration":
  preemption.ENDING.will_save(7)
print("blocks", flush=True)
library = ctypes.CDLL(None)
mutex = ctypes.create_string_buffer(64)
library.pthread_mutex_lock(mutex)
library.pthread_mutex_lock(mutex)
"""


class Clock:
  """A clock that stands still."""

  def __init__(self):
    self.seconds = 0.0

  def __call__(self) -> float:
    return self.seconds


@pytest.fixture(name="clock")
def fixture_clock():
  return Clock()


@pytest.fixture(name="codes")
def fixture_codes():
  """The codes that the process was ended with."""
  return []


@pytest.fixture(name="ending")
def fixture_ending(clock, codes):
  return preemption.Ending(clock, codes.append)


class TestAlone:
  def test_runs_on_as_long_as_nobody_asks(self, ending, codes):
    for iteration in (1, 2, 3):
      ending.will_save(iteration)
      assert not ending.is_due(iteration)
    ending.nothing_to_save()
    ending.act()
    assert codes == []

  def test_ends_at_once_where_nothing_has_to_be_saved(
    self, ending, codes, capfd
  ):
    ending.signal(signal.SIGTERM)
    ending.act()
    assert codes == [75]
    error = capfd.readouterr().err
    assert "asked to end by SIGTERM: nothing has to be saved" in error

  def test_finishes_the_iteration(self, ending, codes, capfd):
    ending.will_save(4)
    ending.signal(signal.SIGINT)
    ending.act()
    assert ending.is_due(4)
    end = ending.saved("after iteration 4 of 9")
    assert (codes, end.code) == ([], 75)
    asked, saved = capfd.readouterr().err.splitlines()
    assert "SIGINT: finishes iteration 4 and saves, within 100 s" in asked
    assert "SIGINT: saved after iteration 4 of 9" in saved

  def test_ends_after_the_next_iteration_where_one_is_past_its_end(
    self, ending
  ):
    ending.will_save(4)
    assert not ending.is_due(4)
    ending.signal(signal.SIGTERM)
    assert not ending.is_due(4)
    assert ending.is_due(5)

  def test_ends_before_an_evaluation_whose_state_is_saved(self, ending, codes):
    ending.will_save(4)
    assert not ending.is_due(4)
    ending.signal(signal.SIGTERM)
    ending.nothing_to_save()
    ending.act()
    assert codes == [75]

  def test_ends_when_the_grace_is_over(self, ending, clock, codes, capfd):
    ending.will_save(4)
    ending.signal(signal.SIGTERM)
    clock.seconds = 99.0
    ending.act()
    assert codes == []
    clock.seconds = 100.0
    ending.act()  # decides it
    ending.act()
    assert codes == [75]
    assert "iteration 4 is not saved" in capfd.readouterr().err

  def test_second_signal_ends_at_once(self, ending, clock, codes):
    ending.will_save(4)
    ending.signal(signal.SIGTERM)
    clock.seconds = 0.5
    ending.signal(signal.SIGTERM)  # as `timeout` sends it: the same
    ending.act()
    assert codes == []
    clock.seconds = 2.0
    ending.signal(signal.SIGTERM)
    ending.act()
    assert codes == [75]


class TestTogether:
  def test_all_end_after_the_furthest(self, ending):
    ending.join_others()
    ending.will_save(4)
    ending.ask("process 1")
    ending.decide([4, 5])
    assert not ending.is_due(4)
    assert ending.is_due(5)

  def test_all_end_at_once_with_one_that_has_nothing_to_save(
    self, ending, clock, codes
  ):
    ending.join_others()
    ending.will_save(1)
    ending.ask("process 1")
    ending.decide([1, preemption.AT_ONCE])
    assert ending.ends_at_once()
    ending.act()
    assert codes == []  # the others are told first
    clock.seconds = preemption.FAREWELL_SECONDS
    ending.act()
    assert codes == [75]

  def test_end_of_an_iteration_waits_for_the_decision(self, ending):
    ending.join_others()
    ending.will_save(4)
    ending.ask("process 1")
    threading.Timer(0.05, ending.decide, ([4, 4],)).start()
    assert ending.position() == 4
    assert ending.is_due(4)


class TestListen:
  @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
  @pytest.mark.parametrize(
    "where, seconds, message",
    [
      ("compilation", 0, "nothing has to be saved; the same command continues"),
      ("iteration", 1, "iteration 7 is not saved; the same command continues"),
    ],
  )
  def test_ends_a_process_whose_main_thread_is_blocked(
    self, number, where, seconds, message
  ):
    process = subprocess.Popen(
      [sys.executable, "-c", BLOCKED, where],
      env=os.environ | {"PYTHONPATH": str(ROOT)},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    assert process.stdout.readline() == "blocks\n"
    start = time.monotonic()
    process.send_signal(number)
    _, error = process.communicate(timeout=30)
    assert process.returncode == preemption.EXIT_CODE
    assert seconds <= time.monotonic() - start < seconds + 5
    assert message in error and "Traceback" not in error

  @pytest.mark.parametrize("is_ignored", [False, True])
  def test_end_of_the_terminal_asks_unless_nohup_is_given(self, is_ignored):
    handler = "SIG_IGN" if is_ignored else "SIG_DFL"
    process = subprocess.Popen(
      [sys.executable, "-c", BLOCKED, "compilation", handler],
      env=os.environ | {"PYTHONPATH": str(ROOT)},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    assert process.stdout.readline() == "blocks\n"
    process.send_signal(signal.SIGHUP)
    if is_ignored:
      time.sleep(0.2)
      assert process.poll() is None
      process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=30)
    assert process.returncode == preemption.EXIT_CODE
    name = "SIGTERM" if is_ignored else "SIGHUP"
    assert f"asked to end by {name}" in error

  def test_a_command_may_take_the_signals_over(self):
    code = """
import os, signal
from r3jax.parallel import preemption
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests run under nohup
preemption.ENDING.listen("nothing")
signal.signal(signal.SIGTERM, lambda *unused: print("mine", flush=True))
preemption.ENDING.leave_signals()
os.kill(os.getpid(), signal.SIGTERM)
assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
os.kill(os.getpid(), signal.SIGHUP)
"""
    done = subprocess.run(
      [sys.executable, "-c", code],
      env=os.environ | {"PYTHONPATH": str(ROOT)},
      capture_output=True,
      text=True,
      timeout=60,
    )
    assert (done.returncode, done.stdout) == (-signal.SIGHUP, "mine\n")
    assert done.stderr == ""

  def test_nothing_ends_a_process_that_is_done(self):
    script = """
import os, signal, time
from r3jax.parallel import preemption

class Late:
  def __del__(self):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
      os.kill(os.getpid(), number)
    time.sleep(0.1)
    os.write(1, b"done")

preemption.ENDING.listen("go on")
late = Late()  # deleted when Python has taken its handlers away
"""
    done = subprocess.run(
      [sys.executable, "-c", script],
      env=os.environ | {"PYTHONPATH": str(ROOT)},
      capture_output=True,
      check=False,
      timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, b"done"), done.stderr

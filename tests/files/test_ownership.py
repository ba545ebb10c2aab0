"""Tests of files/ownership.py."""

import dataclasses
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time

from etils import epath
import jax
import pytest

from r3jax.files import ownership
from r3jax.parallel import multihost


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  """Makes the waits short."""
  monkeypatch.setattr(ownership, "HEARTBEAT_SECONDS", 0.05)
  monkeypatch.setattr(ownership, "STALE_SECONDS", 0.6)
  monkeypatch.setattr(ownership, "_WATCH_SECONDS", 0.3)
  monkeypatch.setattr(ownership, "_POLL_SECONDS", 0.01)
  monkeypatch.setattr(ownership, "_SETTLE_SECONDS", 0.2)
  yield
  ownership.release_all()


@pytest.fixture(params=["disk", "store"])
def lock(request, tmp_path):
  """Path of a lock on a disk and in a store; its folder exists."""
  if request.param == "disk":
    return epath.Path(tmp_path / ownership.FILE)
  request.getfixturevalue("store")
  return epath.Path("gs://bucket/run") / ownership.FILE


def _elsewhere(**changes) -> ownership.Owner:
  """Returns an owner on another machine."""
  owner = ownership._this_process()
  return dataclasses.replace(owner, host="node-7", machine="other", **changes)


def _dead_pid() -> int:
  """Returns the number of a process that has ended."""
  process = subprocess.Popen([sys.executable, "-c", ""])
  process.wait()
  return process.pid


def _write(lock: epath.Path, owner: ownership.Owner) -> None:
  lock.write_bytes(owner.to_bytes())


def _owner(lock: epath.Path) -> ownership.Owner:
  owner = ownership.Owner.from_bytes(lock.read_bytes())
  assert owner is not None
  return owner


def _link_to_nothing(path):
  os.symlink("nowhere", path)


class TestClaim:
  def test_names_this_process_and_is_removed(self, lock):
    with ownership.releasing():
      ownership.claim(lock.parent)
      owner = _owner(lock)
      assert (owner.host, owner.pid) == (socket.gethostname(), os.getpid())
      ownership.claim(lock.parent)  # it is ours
      ownership.check(lock.parent)
      first = owner.heartbeat
      while _owner(lock).heartbeat == first:
        time.sleep(0.01)
      assert _owner(lock).since == owner.since
    assert not lock.exists()
    ownership.release_all()

  def test_of_processes_that_start_together_one_owns(self, lock):
    owners = []
    refusals = []
    barrier = threading.Barrier(8)

    def start():
      barrier.wait()
      try:
        owners.append(ownership._take(lock))
      except ValueError as error:
        refusals.append(str(error))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    assert (len(owners), len(refusals)) == (1, 7)
    assert _owner(lock).id == owners[0].id

  def test_of_two_that_take_over_a_dead_owners_lock_one_owns(self, lock):
    dead = dataclasses.replace(ownership._this_process(), pid=_dead_pid())
    _write(lock, dead)
    self.test_of_processes_that_start_together_one_owns(lock)

  def test_living_owner_of_this_machine_is_named_at_once(self, lock):
    parent = os.getppid()
    owner = dataclasses.replace(
      ownership._this_process(),
      pid=parent,
      process_start=ownership._process_start(parent),
      heartbeat=time.time() - 9000,  # it may be suspended
    )
    _write(lock, owner)
    for function in (ownership.check, ownership.claim):
      with pytest.raises(ValueError) as error:
        function(lock.parent)
      message = str(error.value)
      assert "\n" not in message and str(lock.parent) in message
      assert re.search(
        rf"process {parent} of \S+ on {socket.gethostname()} \(since "
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC, last heartbeat 900\d s ago\)",
        message,
      )
    assert _owner(lock) == owner

  def test_ended_owner_of_this_machine_is_replaced_at_once(
    self, lock, monkeypatch, caplog
  ):
    monkeypatch.setattr(ownership, "_WATCH_SECONDS", 9000)
    own = ownership._this_process()
    ended = dataclasses.replace(own, pid=_dead_pid())
    reused = dataclasses.replace(own, process_start="1")
    for owner in (ended, reused):
      _write(lock, owner)
      ownership.check(lock.parent)
      assert _owner(lock) == owner  # a check writes nothing
      with ownership.releasing():
        ownership.claim(lock.parent)
        assert _owner(lock).id != owner.id
      assert f"from process {owner.pid} of" in caplog.text

  def test_heartbeat_of_another_machine_shows_that_it_lives(self, lock):
    owner = _elsewhere(heartbeat=time.time() - 9000)  # its clock is wrong
    _write(lock, owner)

    def beat():
      time.sleep(0.1)
      _write(lock, dataclasses.replace(owner, heartbeat=owner.heartbeat + 1))

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(ValueError, match=r"process \d+ of \S+ on node-7"):
      ownership.claim(lock.parent)
    thread.join()
    assert _owner(lock).id == owner.id

  def test_silent_owner_of_another_machine_is_replaced(self, lock, caplog):
    _write(lock, _elsewhere())
    start = time.monotonic()
    ownership.check(lock.parent)
    assert time.monotonic() - start > 0.4
    assert "no heartbeat within" in caplog.text and str(lock) in caplog.text
    start = time.monotonic()
    ownership.claim(lock.parent)  # it is not watched twice
    assert time.monotonic() - start < 0.4
    assert _owner(lock).host == socket.gethostname()

  @pytest.mark.parametrize(
    "content",
    [b"", b"\0\xff", b"[" * 60_000, b"{}", b'{"pid": 1e999}', b"9" * 5000],
  )
  def test_unreadable_lock_is_replaced_when_it_does_not_change(
    self, lock, content
  ):
    lock.write_bytes(content)
    ownership.claim(lock.parent)
    assert _owner(lock).pid == os.getpid()

  @pytest.mark.parametrize(
    "changes",
    [
      {"pid": 0},
      {"pid": 2**40},
      {"heartbeat": float("nan")},
      {"since": float("inf")},
      {"host": "a\nb"},
    ],
  )
  def test_impossible_owner_is_none(self, changes):
    owner = dataclasses.replace(ownership._this_process(), **changes)
    assert ownership.Owner.from_bytes(owner.to_bytes()) is None

  @pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, _link_to_nothing])
  def test_what_is_no_file_is_one_message(self, tmp_path, make):
    make(tmp_path / ownership.FILE)
    with pytest.raises(ValueError, match="owner.lock must be the lock file"):
      ownership.claim(tmp_path)

  def test_full_disk_leaves_no_lock_of_nobody(self, tmp_path, monkeypatch):
    def full(_):
      raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
      patch.setattr(ownership.Owner, "to_bytes", full)
      with pytest.raises(ValueError, match="No space left"):
        ownership.claim(tmp_path)
    assert not (tmp_path / ownership.FILE).exists()

  def test_process_0_owns_for_all(self, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    ownership.check(tmp_path)
    ownership.claim(tmp_path)
    assert not list(tmp_path.iterdir())


class TestHolding:
  @pytest.fixture
  def ended(self, monkeypatch):
    """Gets the reasons why this process would have ended."""
    reasons = []
    monkeypatch.setattr(multihost, "end_process", reasons.append)
    return reasons

  def test_owner_whose_lock_was_taken_ends(self, lock, ended, capsys):
    ownership.claim(lock.parent)
    other = _elsewhere()
    _write(lock, other)
    while not ended:
      time.sleep(0.01)
    assert f"process {other.pid} of {other.user} on node-7" in ended[0]
    assert capsys.readouterr().err == f"r3jax: {ended[0]}\n"
    ownership.release_all()
    assert _owner(lock) == other  # it is not ours to remove

  def test_lock_that_was_deleted_comes_back(self, lock, ended):
    ownership.claim(lock.parent)
    lock.unlink()
    while not lock.exists():
      time.sleep(0.01)
    assert not ended

  def test_heartbeat_that_cannot_be_written_is_a_warning(
    self, lock, ended, monkeypatch, caplog
  ):
    ownership.claim(lock.parent)

    def full(*_):
      raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
      patch.setattr(ownership, "_replace", full)
      while "No space left" not in caplog.text:
        time.sleep(0.01)
    before = _owner(lock).heartbeat
    while _owner(lock).heartbeat == before:
      time.sleep(0.01)
    assert not ended

  def test_released_while_a_heartbeat_is_written_it_stays_away(self, lock):
    for _ in range(8):
      with ownership.releasing():
        ownership.claim(lock.parent)
        time.sleep(0.045)
      assert not lock.exists()

  def test_fork_does_not_release(self, tmp_path):
    ownership.claim(tmp_path)
    (held,) = ownership._held.values()
    held._owner = dataclasses.replace(held._owner, pid=os.getppid())
    ownership.release_all()
    assert (tmp_path / ownership.FILE).exists()


_PROGRAM = """
import sys, threading
from r3jax.files import ownership
from r3jax.parallel import endings
ownership.claim(sys.argv[1])
print("owned", flush=True)
if sys.stdin.read(1) == "e":
  threading.Thread(target=endings.end_now, args=(75,)).start()
  threading.Event().wait()
"""


class TestProcess:
  @pytest.fixture
  def start(self, tmp_path):
    """Returns a function that starts a process which owns `tmp_path`."""
    started = []

    def start_owner() -> subprocess.Popen:
      command = [sys.executable, "-c", _PROGRAM, str(tmp_path)]
      process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
      )
      started.append(process)
      assert process.stdout.readline() == "owned\n"
      return process

    yield start_owner
    for process in started:
      process.kill()
      process.communicate()

  def test_killed_owner_is_replaced_at_once(self, start, tmp_path):
    first = start()
    with pytest.raises(ValueError, match=f"process {first.pid} of"):
      ownership.claim(tmp_path)
    first.send_signal(signal.SIGKILL)
    # It is not waited for: what remains of it is no living process.
    stat = pathlib.Path(f"/proc/{first.pid}/stat")
    while stat.read_text().rpartition(")")[2].split()[0] != "Z":
      time.sleep(0.01)
    ownership.claim(tmp_path)
    assert _owner(epath.Path(tmp_path / ownership.FILE)).pid == os.getpid()

  @pytest.mark.parametrize("letter, code", [("e", 75), ("x", 0)])
  def test_ending_releases(self, start, tmp_path, letter, code):
    process = start()
    process.communicate(letter, timeout=60)
    assert process.returncode == code
    assert not list(tmp_path.iterdir())

"""Keeps a folder to one run: a lock file in it names the process that writes there.

FOLDER/owner.lock is a JSON object with host, user, process, start and the time of its last
heartbeat. The owner renews it every HEARTBEAT_SECONDS; a lock that nobody renews is one of a dead
process. On the same machine the process itself shows whether it lives. Elsewhere nothing is read
off two machines' clocks: whoever wants the folder watches the lock, and takes it over if it does
not change.

On a disk, local or shared, a lock is created exclusively, so that of two processes that start
together exactly one owns. An object store has no such call behind `etils.epath`: there, and where a
dead owner's lock is taken over, a process writes its lock and reads it back after _SETTLE_SECONDS;
the last writer owns. A process that stalled longer than that may take a lock that was won already;
the former owner then ends at its next heartbeat.
"""

import atexit
from collections.abc import Iterator
import contextlib
import dataclasses
import datetime
import getpass
import json
import math
import os
import pathlib
import socket
import stat
import sys
import threading
import time
import uuid

from absl import logging
from etils import epath
import jax

from r3jax.files import paths
from r3jax.files import rules
from r3jax.parallel import endings
from r3jax.parallel import multihost

FILE = "owner.lock"
HEARTBEAT_SECONDS = 15.0
# Without a heartbeat for so long, an owner on another machine is dead.
STALE_SECONDS = 180.0
# How long a lock is watched at least, whatever the clocks say: three heartbeats.
_WATCH_SECONDS = 45.0
_POLL_SECONDS = 1.0
_SETTLE_SECONDS = 2.0
# Writing a heartbeat may hang on a dead disk; `endings` waits for a second.
_RELEASE_SECONDS = 1.0
_MAX_BYTES = 65_536
_MAX_PID = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Owner:
  """A process that owns a folder.

  Attributes:
    id: Unique name of this claim.
    host: Name of its machine.
    machine: What tells boots and containers of one host name apart; "" where nothing does.
    pid: Number of the process.
    process_start: When the kernel started it, in its own unit; "" where that is unknown.
    user: Who started it.
    since: Seconds since 1970 when it took the folder.
    heartbeat: Seconds since 1970 of its last heartbeat.
  """

  id: str
  host: str
  machine: str
  pid: int
  process_start: str
  user: str
  since: float
  heartbeat: float

  def to_bytes(self) -> bytes:
    """Returns the content of the lock file."""
    return (json.dumps(dataclasses.asdict(self), indent=1) + "\n").encode()

  @classmethod
  def from_bytes(cls, content: bytes) -> "Owner | None":
    """Returns the owner that a lock file names; None where it names none."""
    try:
      values = json.loads(content)
    except (ValueError, RecursionError):
      return None
    fields = dataclasses.fields(cls)
    if not isinstance(values, dict) or len(values) != len(fields):
      return None
    for field in fields:
      if type(values.get(field.name)) is not field.type:
        return None
    owner = cls(**values)
    texts = (owner.host, owner.user)
    times = (owner.since, owner.heartbeat)
    is_possible = (
      0 < owner.pid <= _MAX_PID
      and all(map(rules.is_line, texts))
      and all(map(math.isfinite, times))
    )
    return owner if is_possible else None

  def describe(self) -> str:
    """Returns "process 12 of ann on HOST (since ..., last heartbeat 3 s ago)"."""
    seconds = max(0, round(time.time() - self.heartbeat))
    return (
      f"process {self.pid} of {self.user} on {self.host} (since {_date(self.since)}, last "
      f"heartbeat {seconds} s ago)"
    )


def _date(seconds: float) -> str:
  """Returns a time as people read it; a lock may name an impossible one."""
  try:
    date = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
  except (OverflowError, ValueError, OSError):
    return "an unknown time"
  return date.strftime("%Y-%m-%d %H:%M:%S UTC")


def _this_process() -> Owner:
  """Returns this process as the owner of a folder from now on."""
  now = time.time()
  try:
    user = getpass.getuser()
  except (KeyError, OSError):  # a container's user may have no name
    user = str(os.getuid())
  return Owner(
    id=uuid.uuid4().hex,
    host=socket.gethostname(),
    machine=_machine(),
    pid=os.getpid(),
    process_start=_process_start(os.getpid()) or "",
    user=user,
    since=now,
    heartbeat=now,
  )


def _machine() -> str:
  """Returns the boot and the container of this process; "" where the system does not say."""
  try:
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"
  except OSError:
    return ""


def _process_start(pid: int) -> str | None:
  """Returns when a process of this machine was started; None if it has ended.

  The result is "" for a process whose start is unknown. Numbers of processes are used again; the
  start tells which of them a lock means.
  """
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return None
  except PermissionError:  # it is another user's
    pass
  try:
    status = pathlib.Path(f"/proc/{pid}/stat").read_text()
  except OSError:
    return ""
  # The name of the program, in brackets, may hold anything.
  fields = status.rpartition(")")[2].split()
  state = fields[0]
  if state in "ZX":  # ended, but its parent has not noticed
    return None
  return fields[19]


def _lives(owner: Owner) -> bool | None:
  """Returns whether an owner lives; None where only its heartbeat can tell."""
  here = (socket.gethostname(), _machine())
  if (owner.host, owner.machine) != here:
    return None
  start = _process_start(owner.pid)
  if start is None:
    return False
  if not start or not owner.process_start:
    return None
  return start == owner.process_start


# --- The file -------------------------------------------------------------------------------------


def _is_store(path: epath.Path) -> bool:
  return "://" in str(path)


def _read(path: epath.Path) -> bytes | None:
  """Returns the content of a lock, None if there is no lock.

  Raises:
    ValueError: What lies there is no file.
    OSError: It cannot be read.
  """
  try:
    if _is_store(path):
      return path.read_bytes()
    # A pipe of that name must not be opened: it would wait for a writer.
    if not stat.S_ISREG(os.stat(path).st_mode):
      raise ValueError(
        f"{path} must be the lock file of a run, and is no file: remove it"
      )
    with open(path, "rb") as file:
      return file.read(_MAX_BYTES)
  except (FileNotFoundError, NotADirectoryError):
    if os.path.islink(path):
      # Nothing can be created there, and nothing would ever appear.
      raise ValueError(
        f"{path} must be the lock file of a run, and leads nowhere: remove it"
      ) from None
    return None


def _create(path: epath.Path, owner: Owner) -> bool:
  """Creates a lock on a disk, exclusively; returns False if there is one."""
  flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
  try:
    descriptor = os.open(path, flags, 0o644)
  except FileExistsError:
    return False
  try:
    with open(descriptor, "wb") as file:
      file.write(owner.to_bytes())
  except OSError:
    # The lock of nobody would keep the next start waiting.
    os.unlink(path)
    raise
  return True


def _replace(path: epath.Path, owner: Owner) -> None:
  """Writes a lock, whole, whatever is there."""
  if _is_store(path):
    path.write_bytes(owner.to_bytes())
    return
  partial = pathlib.Path(f"{path}.{owner.id}.partial")
  partial.write_bytes(owner.to_bytes())
  os.replace(partial, path)


# --- Taking a folder ------------------------------------------------------------------------------

# Contents of locks that were watched and did not change.
_dead: set[bytes] = set()


def _refusal(path: epath.Path, owner: Owner) -> ValueError:
  return ValueError(
    f"{path.parent} must have one run at a time; {owner.describe()} writes there. End it first, or "
    "use another folder"
  )


def check(folder: epath.PathLike) -> None:
  """Checks that no other process writes a folder; process 0 does, and writes nothing.

  A lock of another machine is watched, see `claim`.

  Raises:
    ValueError: A living process owns it, or its lock cannot be read.
  """
  folder = paths.of_user(folder)
  if jax.process_index() or _key(folder) in _held:
    return
  try:
    _wait_until_free(folder / FILE)
  except OSError as error:
    raise _unusable(folder, error) from error


def _unusable(folder: epath.Path, error: OSError) -> ValueError:
  return ValueError(
    f"{folder / FILE} must be readable and writable, it is the lock of the run there: {error}"
  )


def _wait_until_free(path: epath.Path) -> bytes | None:
  """Returns the content of a dead process's lock, None if there is no lock.

  Raises:
    ValueError: The owner lives.
  """
  content = _read(path)
  if content is None:
    return None
  owner = Owner.from_bytes(content)
  lives = _lives(owner) if owner else None
  if lives:
    raise _refusal(path, owner)
  if lives is False or content in _dead:
    return content

  wait = STALE_SECONDS
  name = "a process that it does not name"
  if owner:
    wait -= max(0.0, time.time() - owner.heartbeat)
    name = owner.describe()
  wait = max(wait, _WATCH_SECONDS)
  logging.warning(
    "%s is locked by %s; it is taken over if there is no heartbeat within %d s (delete %s if that "
    "process has ended)",
    path.parent,
    name,
    wait,
    path,
  )
  end = time.monotonic() + wait
  while time.monotonic() < end:
    time.sleep(_POLL_SECONDS)
    newer_content = _read(path)
    if newer_content == content:
      continue
    newer = Owner.from_bytes(newer_content) if newer_content else None
    if owner and newer and owner.id == newer.id:
      raise _refusal(path, newer)
    return _wait_until_free(path)
  _dead.add(content)
  return content


def _take(path: epath.Path) -> Owner:
  """Returns this process as the owner of a lock, which it has taken.

  Raises:
    ValueError: Another process owns it.
  """
  owner = _this_process()
  while True:
    former = _wait_until_free(path)
    if former is None and not _is_store(path):
      if _create(path, owner):
        return owner
      continue  # another process was faster
    if _read(path) != former:
      continue
    _replace(path, owner)
    time.sleep(_SETTLE_SECONDS)
    if _is_of(owner, _read(path)):
      break
  if former is not None:
    former_owner = Owner.from_bytes(former)
    name = former_owner.describe() if former_owner else "an unknown process"
    logging.warning("took over %s from %s, which has ended", path.parent, name)
  return owner


def _is_of(owner: Owner, content: bytes | None) -> bool:
  """Returns whether the content of a lock is a claim's."""
  present = Owner.from_bytes(content) if content else None
  return present is not None and present.id == owner.id


# --- Holding it -----------------------------------------------------------------------------------


class _Lock:
  """A lock that this process holds; a thread renews it."""

  def __init__(self, path: epath.Path, owner: Owner):
    """Renews the lock at `path` for `owner` from now on."""
    self._path = path
    self._owner = owner
    self._has_ended = threading.Event()
    # A heartbeat that is being written must not bring a released lock back. Reentrant: a signal may
    # interrupt a release to release.
    self._writing = threading.RLock()
    self._thread = threading.Thread(target=self._beat, daemon=True)
    self._thread.start()

  def _beat(self) -> None:
    """Renews the lock until it is released; ends the process if another one has taken it."""
    while not self._has_ended.wait(HEARTBEAT_SECONDS):
      with self._writing:
        if self._has_ended.is_set():
          return
        try:
          problem = self.renew()
        except (OSError, ValueError) as error:
          logging.warning("no heartbeat for %s: %s", self._path, error)
          continue
      if problem:
        sys.stderr.write(f"r3jax: {problem}\n")
        multihost.end_process(problem)
        return

  def renew(self) -> str:
    """Writes a heartbeat; returns why it must not, "" if it may.

    Raises:
      OSError: The file cannot be read or written.
      ValueError: What lies there is no file.
    """
    content = _read(self._path)
    present = Owner.from_bytes(content) if content else None
    if present and present.id != self._owner.id:
      return (
        f"{self._path.parent} must have one run at a time, and {present.describe()} has taken it "
        "over: this process ends, without writing there again"
      )
    renewed = dataclasses.replace(self._owner, heartbeat=time.time())
    if content is None and not _is_store(self._path):
      # Deleted by hand: somebody else may be about to take it.
      _create(self._path, renewed)
    else:
      _replace(self._path, renewed)
    return ""

  def release(self) -> None:
    """Removes the lock, if it is still this process's; from any thread, and again."""
    if os.getpid() != self._owner.pid:  # a fork of the owner
      return
    self._has_ended.set()
    if not self._writing.acquire(timeout=_RELEASE_SECONDS):
      return
    try:
      if _is_of(self._owner, _read(self._path)):
        self._path.unlink()
    except (OSError, ValueError) as error:
      logging.warning("%s was not removed: %s", self._path, error)
    finally:
      self._writing.release()


# The locks of this process by folder.
_held: dict[str, _Lock] = {}


def _key(folder: epath.Path) -> str:
  return str(paths.absolute(folder))


def claim(folder: epath.PathLike) -> None:
  """Makes this run the only one that writes a folder, until it is released or the process ends.

  Of several processes, process 0 owns for all. A folder that this process owns already stays its
  own. The lock of a process that has ended on this machine is taken over at once. The lock of
  another machine is watched for up to STALE_SECONDS: if there is a heartbeat meanwhile, its owner
  lives.

  If another process takes the lock over all the same, this process ends at its next heartbeat.

  Args:
    folder: Made if missing.

  Raises:
    ValueError: A living process owns it, or it cannot be written.
  """
  if jax.process_index():
    return
  folder = paths.of_user(folder)
  key = _key(folder)
  if key in _held:
    return
  path = folder / FILE
  try:
    folder.mkdir(parents=True, exist_ok=True)
    _held[key] = _Lock(path, _take(path))
  except OSError as error:
    raise _unusable(folder, error) from error
  endings.before_end(release_all)
  # Registered again it would be called twice, which does no harm.
  atexit.register(release_all)


def release_all() -> None:
  """Releases all folders of this process, within seconds and from any thread.

  The threads that write there must have ended, or the process must end now.
  """
  for key, lock in list(_held.items()):
    lock.release()
    _held.pop(key, None)


@contextlib.contextmanager
def releasing() -> Iterator[None]:
  """Releases, when the block ends, the folders that are claimed inside of it."""
  before = set(_held)
  try:
    yield
  finally:
    for key in set(_held) - before:
      lock = _held.pop(key, None)
      if lock is not None:
        lock.release()

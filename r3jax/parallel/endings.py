"""Ends a process at once, after what must not stay undone.

`os._exit` skips Python's clean-up, which a thread cannot run for the main thread, and in which JAX
would wait for other processes. What must be undone all the same, such as a lock, is registered
here.
"""

from collections.abc import Callable
import os
import sys
import threading
from typing import NoReturn

from absl import logging

# How long duties and the log may take. The main thread may hold a lock that they need, for example
# that of the log while it waits for a full pipe.
LIMIT_SECONDS = 3.0
# In the order in which they were registered.
_duties: list[Callable[[], None]] = []


def before_end(duty: Callable[[], None]) -> None:
  """Calls a function before `end_now` ends the process.

  Args:
    duty: Called on a thread of its own, while other threads run on; it takes a second at most and
      raises no error. A function that is registered twice is called once.
  """
  if duty not in _duties:
    _duties.append(duty)


def end_now(code: int) -> NoReturn:
  """Ends this process by `os._exit`, from any thread, after all duties and with flushed logs.

  What takes longer than LIMIT_SECONDS is left.

  Args:
    code: Exit code of the process.
  """
  thread = threading.Thread(target=_do_duties, daemon=True)
  thread.start()
  thread.join(LIMIT_SECONDS)
  os._exit(code)


def _do_duties() -> None:
  for duty in _duties:
    duty()
  logging.flush()
  sys.stdout.flush()
  sys.stderr.flush()

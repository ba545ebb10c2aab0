"""Ends a process at once, after what must not stay undone.

`os._exit` skips Python's clean-up, which a thread cannot run for the main thread, and in which JAX
would wait for other processes. What must be undone all the same, such as a lock, is registered
here.
"""

from collections.abc import Callable
import os
from typing import NoReturn

from absl import logging

# In the order in which they were registered.
_duties: list[Callable[[], None]] = []


def before_end(duty: Callable[[], None]) -> None:
  """Calls a function before `end_now` ends the process.

  Args:
    duty: Called on the thread that ends the process, while other threads run on; it takes seconds
      at most and raises no error. A function that is registered twice is called once.
  """
  if duty not in _duties:
    _duties.append(duty)


def end_now(code: int) -> NoReturn:
  """Ends this process by `os._exit`, from any thread, after all duties and with flushed logs.

  Args:
    code: Exit code of the process.
  """
  for duty in _duties:
    duty()
  logging.flush()
  os._exit(code)

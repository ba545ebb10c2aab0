"""Tests of parallel/endings.py."""

import subprocess
import sys

_PROGRAM = """
import threading
from r3jax.parallel import endings
def duty():
  print("done", flush=True)
endings.before_end(duty)
endings.before_end(duty)
threading.Thread(target=endings.end_now, args=(7,)).start()
threading.Event().wait()
"""


class TestEndNow:
  def test_duties_are_done_once_on_the_thread_that_ends_the_process(self):
    ended = subprocess.run(
      [sys.executable, "-c", _PROGRAM],
      capture_output=True,
      text=True,
      timeout=60,
      check=False,
    )
    assert (ended.returncode, ended.stdout) == (7, "done\n"), ended.stderr

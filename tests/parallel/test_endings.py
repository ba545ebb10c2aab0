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


_HANGING_PROGRAM = """
import threading
from r3jax.parallel import endings
endings.LIMIT_SECONDS = 0.1
endings.before_end(threading.Event().wait)
endings.end_now(7)
"""


class TestEndNow:
  def test_duty_that_hangs_does_not_keep_the_process(self):
    ended = subprocess.run(
      [sys.executable, "-c", _HANGING_PROGRAM], timeout=60, check=False
    )
    assert ended.returncode == 7

  def test_duties_are_done_once_before_the_process_ends(self):
    ended = subprocess.run(
      [sys.executable, "-c", _PROGRAM],
      capture_output=True,
      text=True,
      timeout=60,
      check=False,
    )
    assert (ended.returncode, ended.stdout) == (7, "done\n"), ended.stderr

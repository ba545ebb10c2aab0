"""One of two processes of which the second comes to grief while the first computes with it.

python tests/parallel/fragile.py PROCESS COORDINATOR HOW

HOW: raises, killed, late, first_raises, first_killed, silent (killed while the other waits outside
of a computation, for signs of life); asked (to end, in the third iteration), asked_early (before
the first), asked_twice (in the third iteration, which does not end), asked_last (after the first
process is done).
"""

import os
import signal
import sys
import time

from absl import logging
from jax.experimental import multihost_utils
import numpy as np

from r3jax.parallel import agreement
from r3jax.parallel import multihost
from r3jax.parallel import preemption

PROCESS, COORDINATOR, HOW = int(sys.argv[1]), *sys.argv[2:]


def main():
  if HOW == "silent":
    multihost._BEAT_SECONDS = 1.0
    multihost._SILENT_SECONDS = 5.0
  multihost.initialize(COORDINATOR, 2, PROCESS)
  with multihost.ending_together():
    multihost.raise_together(None)
    if (HOW, PROCESS) in (("raises", 1), ("first_raises", 0)):
      raise OSError("no space left\non the device")
    if HOW == "silent":
      wait_for_signs_of_life()
    if (HOW, PROCESS) in (("killed", 1), ("first_killed", 0)):
      os.kill(os.getpid(), signal.SIGKILL)
    if (HOW, PROCESS) == ("late", 1):
      time.sleep(1000)
    if HOW == "late":
      multihost.WAIT_SECONDS = 2
      multihost.raise_together(None)
    print("computes", flush=True)
    multihost_utils.process_allgather(np.ones(1))


def wait_for_signs_of_life():
  """Is killed, or waits for the end that others bring."""
  if PROCESS == 1:
    time.sleep(3)
    os.kill(os.getpid(), signal.SIGKILL)
  time.sleep(1000)


def iterate():
  """Computes with the other process until the second one gets a signal."""
  ending = preemption.ENDING
  ending.listen("the same command continues")
  multihost.initialize(COORDINATOR, 2, PROCESS)
  ending.claim_signals()
  with multihost.ending_together(), agreement.ending_when_asked():
    if HOW == "asked_last":
      if PROCESS == 1:
        time.sleep(2)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1000)
      return
    for number in range(1, 1000):
      if (HOW, PROCESS) == ("asked_early", 1):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1000)
      ending.will_save(number)
      if PROCESS == 1 and number == 3:
        os.kill(os.getpid(), signal.SIGTERM)
        if HOW == "asked_twice":
          time.sleep(1.5)
          os.kill(os.getpid(), signal.SIGTERM)
          time.sleep(1000)
      multihost_utils.process_allgather(np.ones(1))
      if ending.is_due(number):
        raise ending.saved(f"after iteration {number}")


logging.use_absl_handler()
if HOW.startswith("asked"):
  iterate()
else:
  main()

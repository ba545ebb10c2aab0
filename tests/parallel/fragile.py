"""One of two processes of which the second comes to grief while the first computes with it.

python tests/parallel/fragile.py PROCESS COORDINATOR HOW     HOW: raises, killed, late, first_raises
"""

import os
import signal
import sys
import time

from absl import logging
from jax.experimental import multihost_utils
import numpy as np

from r3jax.parallel import multihost

PROCESS, COORDINATOR, HOW = int(sys.argv[1]), *sys.argv[2:]


def main():
  multihost.initialize(COORDINATOR, 2, PROCESS)
  with multihost.ending_together():
    multihost.raise_together(None)
    if (HOW, PROCESS) in (("raises", 1), ("first_raises", 0)):
      raise OSError("no space left\non the device")
    if (HOW, PROCESS) == ("killed", 1):
      os.kill(os.getpid(), signal.SIGKILL)
    if (HOW, PROCESS) == ("late", 1):
      time.sleep(1000)
    if HOW == "late":
      multihost.WAIT_SECONDS = 2
      multihost.raise_together(None)
    print("computes", flush=True)
    multihost_utils.process_allgather(np.ones(1))


logging.use_absl_handler()
main()

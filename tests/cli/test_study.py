"""Tests of cli/study.py: the names of studies, and signals while a run lasts."""

import os
import signal
import sys
import threading
import time

import pytest

from r3jax.cli import study

# Writes a file when it listens, and ends as a run does that was asked to.
CHILD = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
pathlib.Path(sys.argv[1]).write_text("")
time.sleep(60)
"""


def test_unknown_study_names_the_nearest():
  with pytest.raises(ValueError, match="STUDY must be one of main, .* rounds?"):
    study._plan("round")


def test_a_run_gets_the_signals_of_the_study_which_waits_for_it(tmp_path):
  former = signal.getsignal(signal.SIGTERM)
  path = tmp_path / "listens"

  def ask_to_end():
    while not path.exists():
      time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)

  thread = threading.Thread(target=ask_to_end)
  thread.start()
  code = study._run([sys.executable, "-c", CHILD, str(path)])
  thread.join()
  assert code == 75
  assert signal.getsignal(signal.SIGTERM) == former

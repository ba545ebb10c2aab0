"""Tests that two processes verify a checkpoint together and agree on it."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def _free_port() -> int:
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]


@pytest.mark.slow
def test_damage_of_one_process_files_takes_both_to_the_one_before(tmp_path):
  coordinator = f"127.0.0.1:{_free_port()}"
  environment = os.environ | {
    "PYTHONPATH": str(ROOT),
    "XLA_FLAGS": "",
    "JAX_NUM_CPU_DEVICES": "2",
  }
  processes = [
    subprocess.Popen(
      [
        sys.executable,
        "tests/checkpoint/two_processes.py",
        str(process),
        coordinator,
        str(tmp_path),
      ],
      cwd=ROOT,
      env=environment,
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
    )
    for process in range(2)
  ]
  try:
    outputs = [process.communicate(timeout=300)[0] for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert [process.returncode for process in processes] == [0, 0], outputs
  for output in outputs:
    assert "restored 2 4097.0 ['2', '3.damaged']" in output, outputs

"""Runs Python code in processes of their own, as on a machine without TensorFlow."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
# Makes Python see no TensorFlow.
WITHOUT_TENSORFLOW = """
import importlib.machinery as machinery
find = machinery.PathFinder.find_spec
machinery.PathFinder.find_spec = classmethod(
    lambda cls, name, *args: None if name.split('.')[0] == 'tensorflow' else find(name, *args))
"""


def start(code, *arguments):
  environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  return subprocess.Popen(
    [sys.executable, "-c", WITHOUT_TENSORFLOW + code, *map(str, arguments)],
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def result(process):
  """Returns the number that a process printed last."""
  output, errors = process.communicate(timeout=120)
  assert process.returncode == 0, errors
  return int(output.split()[-1])

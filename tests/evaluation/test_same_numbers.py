"""The shipped model's evaluation is the same for all batch sizes and numbers of devices."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

from r3jax.evaluation import sample_log

ROOT = pathlib.Path(__file__).parents[2]
PROMPTS = 60


def evaluate(
  folder: pathlib.Path, devices: int, batch_size: int
) -> pathlib.Path:
  """Evaluates with as many CPU devices."""
  environment = os.environ | {
    "PYTHONPATH": str(ROOT),
    "XLA_FLAGS": "",
    "JAX_NUM_CPU_DEVICES": str(devices),
  }
  command = [
    sys.executable,
    "launch/evaluate.py",
    "--config=configs/r3_geneval.py:shapes",
    f"--workdir={folder}",
    f"--config.eval.prompts={PROMPTS}",
    f"--config.eval.batch_size={batch_size}",
    "--config.eval.ask=('match','count')",
    "--config.eval.labelled_images=",
  ]
  subprocess.run(
    command, cwd=ROOT, env=environment, capture_output=True, check=True
  )
  return folder


@pytest.fixture(name="expected", scope="module")
def fixture_expected(tmp_path_factory):
  return evaluate(tmp_path_factory.mktemp("expected"), 1, 32)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
  "devices, batch_size", [(1, 1), (1, 7), (8, 32), (8, 8)]
)
def test_numbers_texts_and_images(expected, tmp_path, devices, batch_size):
  found = evaluate(tmp_path, devices, batch_size)
  ours, theirs = (sample_log.read(folder) for folder in (found, expected))

  def texts(samples):
    rows = []
    for sample in samples:
      turns = [turn.text for turn in sample.turns]
      answers = [answer.text for answer in sample.answers]
      rows.append([sample.key, *turns, *answers])
    return rows

  assert texts(ours) == texts(theirs)
  files = sorted(path.name for path in (expected / "images").iterdir())
  assert files == sorted(path.name for path in (found / "images").iterdir())

  def picture(folder, name):
    return np.asarray(Image.open(folder / "images" / name)).astype(int)

  assert (
    max(
      np.abs(picture(found, name) - picture(expected, name)).max()
      for name in files
    )
    <= 1
  )
  mine, other = (
    json.loads((folder / "summary.json").read_text())
    for folder in (found, expected)
  )
  for name in ("tags", "stops", "understanding", "behaviour", "refinement"):
    assert mine[name] == other[name], name

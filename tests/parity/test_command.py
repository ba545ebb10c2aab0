"""`launch/check_parity.py` as a user runs it."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

from tests import goldens_lib

ROOT = pathlib.Path(__file__).parents[2]


def _run(*arguments: str) -> subprocess.CompletedProcess:
  command = [sys.executable, "launch/check_parity.py", *arguments]
  return subprocess.run(
    command,
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=600,
  )


def _folder(tmp_path, *cases: str) -> pathlib.Path:
  """Returns a copy of the goldens with these cases only."""
  folder = tmp_path / "goldens"
  shutil.copytree(goldens_lib.FOLDER, folder)
  manifest = json.loads((folder / "manifest.json").read_text())
  (folder / "manifest.json").write_text(
    json.dumps({case: manifest[case] for case in cases})
  )
  return folder


def test_prints_a_table_and_passes(tmp_path):
  found = _run(f"--goldens={_folder(tmp_path, 'c_time_pos', 'j_mask')}")
  assert found.returncode == 0, found.stderr
  lines = found.stdout.splitlines()
  assert [line.split()[0] for line in lines[1:3]] == ["c_time_pos", "j_mask"]
  assert all(" pass " in line for line in lines[1:3])
  assert lines[-1].startswith(
    "2 of 2 cases pass on cpu, float32, products highest"
  )


def test_a_skipped_case_is_no_pass(tmp_path):
  found = _run(
    f"--goldens={_folder(tmp_path, 'c_time_pos', 'j_mask')}", "--cases=j_mask"
  )
  assert found.returncode == 1
  assert "c_time_pos                 SKIPPED" in found.stdout
  assert "1 of 2 cases pass" in found.stdout


def test_bfloat16_shows_its_errors_and_fails_at_a_scale_only(tmp_path):
  folder = _folder(tmp_path, "b_vit")
  shown = _run(f"--goldens={folder}", "--dtype=bfloat16")
  assert (
    shown.returncode == 0
    and "1 of 1 cases pass on cpu, bfloat16" in shown.stdout
  )
  columns = shown.stdout.splitlines()[1].split()
  excess, median, largest = (float(column) for column in columns[5:8])
  assert excess > 10  # it is far from float32's tolerance
  # and as far from float32 as bfloat16 is: 2^-8 and a few layers
  assert 1e-3 < median <= largest < 2e-2
  assert (
    _run(
      f"--goldens={folder}", "--dtype=bfloat16", "--tolerance_scale=2"
    ).returncode
    == 1
  )


def test_a_folder_without_a_manifest_is_refused(tmp_path):
  found = _run(f"--goldens={tmp_path}")
  assert found.returncode == 1
  assert found.stderr.splitlines()[-1].startswith(
    "r3jax: --goldens must be a folder with manifest.json"
  )

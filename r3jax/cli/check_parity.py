"""Compares r3jax with recorded numbers of the reference, case by case.

  r3jax check-parity --goldens=tests/goldens/tiny-a

The exit code is 0 where every case of the folder's manifest ran and passed. In float32 with full
products an array passes within the manifest's tolerance. Otherwise (--dtype, --matmul_precision)
an array fails where it is not finite or beyond --tolerance_scale, and the last columns of the table
show how far the lower precision is from float32: relative errors |computed - recorded| / |recorded|
of the case's arrays, their median and the largest.
"""

import pathlib
import sys
import time

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from r3jax.cli import command_line
from r3jax.files import paths
from r3jax.files import rules
from r3jax.parity import check
from r3jax.parity import goldens


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_string(
    "goldens", None, "Folder of weights, manifest.json and cases."
  )
  flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Compute dtype of the model."
  )
  flags.DEFINE_enum(
    "matmul_precision",
    "highest",
    ["highest", "high", "default"],
    "Precision of products in float32.",
  )
  flags.DEFINE_enum(
    "resize_order",
    "width_first",
    ["width_first", "cheaper_first"],
    "Which pass of a resize comes first: width_first as in Pillow before 13, with which BAGEL was "
    "trained; cheaper_first for folders that were recorded with Pillow 13 or later.",
  )
  flags.DEFINE_float(
    "tolerance_scale",
    None,
    "Errors may be this many times the tolerance. Default: 1 in full float32, else no limit.",
  )
  flags.DEFINE_list(
    "cases",
    None,
    "Prefixes of the cases to run; the others count as skipped.",
  )
  command_line.require(goldens="a folder with manifest.json")
  command_line.limit(tolerance_scale=rules.Real(1e-6, 1e12))


def run() -> None:
  """Prints a line per case; exits with 1 where one did not pass."""
  values = flags.FLAGS
  jax.config.update("jax_default_matmul_precision", values.matmul_precision)
  folder = pathlib.Path(values.goldens)
  if not (folder / "manifest.json").is_file():
    sys.exit(
      f"r3jax: --goldens must be a folder with manifest.json; there is none in {folder}"
      f"{paths.did_you_mean(folder)}"
    )
  golden = goldens.Golden(
    folder, jnp.dtype(values.dtype).type, values.resize_order
  )
  scale = _tolerance_scale()
  num_passed = 0
  print(
    f"{'case':26} {'arrays':>6} {'worst array':34} {'error':>10} {'tolerance':>22} {'of it':>9}"
    f" {'median':>8} {'largest':>8}"
  )
  for case in golden.manifest:
    if values.cases and not case.startswith(tuple(values.cases)):
      print(f"{case:26} SKIPPED")
      continue
    start = time.monotonic()
    verdicts = list(check.check(golden, case))
    seconds = time.monotonic() - start
    passes = all(verdict.passes(scale) for verdict in verdicts)
    num_passed += passes
    print(_row(case, verdicts, passes, seconds), flush=True)
  num_cases = len(golden.manifest)
  device = jax.devices()[0].device_kind
  print(
    f"{num_passed} of {num_cases} cases pass on {device}, {values.dtype}, "
    f"products {values.matmul_precision}"
  )
  sys.exit(num_passed != num_cases)


def _tolerance_scale() -> float:
  values = flags.FLAGS
  if values.tolerance_scale is not None:
    return values.tolerance_scale
  is_full = values.dtype == "float32" and values.matmul_precision == "highest"
  return 1.0 if is_full else np.inf


def _row(
  case: str, verdicts: list[check.Verdict], passes: bool, seconds: float
) -> str:
  """Returns the line of a case: its worst array, its relative errors, and whether it passes."""
  worst = max(
    verdicts, key=lambda verdict: (not verdict.finite, verdict.excess)
  )
  relative = [verdict.relative for verdict in verdicts]
  verdict = "pass" if passes else "FAIL"
  return (
    f"{case:26} {len(verdicts):6} {worst.name:34.34} {worst.error:10.2e} "
    f"{worst.tolerance!s:>22.22} {worst.excess:9.3f} "
    f"{np.median(relative):8.1e} {np.max(relative):8.1e} {verdict} {seconds:6.1f} s"
  )

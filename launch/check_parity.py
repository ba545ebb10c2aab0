"""Compares r3jax with recorded numbers of the reference, case by case.

  python launch/check_parity.py --goldens=tests/goldens/tiny-a

Exits with 0 if every case of the folder's manifest was run and passed. In float32 with full products
an array passes within the manifest's tolerance; otherwise (--dtype, --matmul_precision) the errors
are what is asked for, and an array fails when it is not finite or beyond --tolerance_scale.
"""

import pathlib
import sys
import time

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from r3jax.parity import check
from r3jax.parity import goldens

_GOLDENS = flags.DEFINE_string(
  "goldens", None, "Folder of weights, manifest.json and cases."
)
_DTYPE = flags.DEFINE_enum(
  "dtype", "float32", ["float32", "bfloat16"], "Compute dtype of the model."
)
_PRECISION = flags.DEFINE_enum(
  "matmul_precision",
  "highest",
  ["highest", "high", "default"],
  "Of products in float32.",
)
_SCALE = flags.DEFINE_float(
  "tolerance_scale",
  None,
  "Errors may be this many times the tolerance. Default: 1 in full float32, else no limit.",
)
_CASES = flags.DEFINE_list(
  "cases", None, "Only the cases that start so; the others count as skipped."
)


def _scale() -> float:
  if _SCALE.value is not None:
    return _SCALE.value
  return (
    1.0
    if (_DTYPE.value, _PRECISION.value) == ("float32", "highest")
    else np.inf
  )


def _worst(verdicts: list[check.Verdict]) -> check.Verdict:
  return max(verdicts, key=lambda verdict: (not verdict.finite, verdict.excess))


def _row(
  case: str, verdicts: list[check.Verdict], scale: float, seconds: float
) -> tuple[str, bool]:
  """Returns a line of the table, and whether the case passes."""
  worst, passes = (
    _worst(verdicts),
    all(verdict.passes(scale) for verdict in verdicts),
  )
  columns = f"{case:26} {len(verdicts):6} {worst.name:34.34} {worst.error:10.2e} {worst.tolerance!s:>22.22}"
  return (
    f"{columns} {worst.excess:9.3f} {'pass' if passes else 'FAIL'} {seconds:6.1f} s",
    passes,
  )


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  jax.config.update("jax_default_matmul_precision", _PRECISION.value)
  folder = pathlib.Path(_GOLDENS.value)
  if not (folder / "manifest.json").is_file():
    sys.exit(
      f"r3jax: --goldens must be a folder with manifest.json; there is none in {folder}"
    )
  golden, scale, bad = (
    goldens.Golden(folder, jnp.dtype(_DTYPE.value).type),
    _scale(),
    [],
  )
  print(
    f"{'case':26} {'arrays':>6} {'worst array':34} {'error':>10} {'tolerance':>22} {'of it':>9}"
  )
  for case in golden.manifest:
    if _CASES.value and not case.startswith(tuple(_CASES.value)):
      print(f"{case:26} SKIPPED")
      bad.append(case)
      continue
    start = time.monotonic()
    verdicts = list(check.check(golden, case))
    line, passes = _row(case, verdicts, scale, time.monotonic() - start)
    print(line, flush=True)
    bad += [] if passes else [case]
  device = jax.devices()[0].device_kind
  print(
    f"{len(golden.manifest) - len(bad)} of {len(golden.manifest)} cases pass on {device}, {_DTYPE.value}, "
    f"products {_PRECISION.value}"
  )
  sys.exit(1 if bad else 0)


if __name__ == "__main__":
  flags.mark_flag_as_required("goldens")
  app.run(main)

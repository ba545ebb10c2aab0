"""Runs the cases of a folder and compares what they compute with the recorded arrays."""

from collections.abc import Iterator
import dataclasses
import re
from typing import Any

import numpy as np

from r3jax.parity import flow
from r3jax.parity import goldens
from r3jax.parity import language
from r3jax.parity import perception
from r3jax.parity import results
from r3jax.parity import rules
from r3jax.parity import tolerance as tolerances
from r3jax.parity import training

CASES: dict[str, results.Case] = {  # by the pattern of a case's name
  "a_vae": perception.autoencoding,
  "b_vit": perception.vision,
  "c_time_pos": language.tables,
  "d_text": language.text,
  "e_reflect": language.reflection,
  "f_flow_edit": flow.edit_velocities,
  "f_flow_gen": flow.draft_velocities,
  "g_ode_(gen|edit)": flow.ode,
  "h_mix_(gen|edit)": flow.mixed,
  "h_sde_math": flow.sde,
  "i_sampling": language.sampling,
  "j_mask": rules.visibility,
  "j_pack_(gen|edit)": training.scores,
  "j_pack_multi": rules.packs,
  "k_loss_(gen|edit)_(consistent|onpolicy|perturbed)": training.loss,
  "l_advantages": rules.returns_and_advantages,
  "m_format": language.formats,
  "n_resize": perception.sizes_after_resize,
  "n_resize_pixels": perception.resized_pixels,
  "o_buffer": rules.pool,
}


@dataclasses.dataclass(frozen=True)
class Verdict:
  """The comparison of one array.

  Attributes:
    case: of the array.
    name: of the array.
    error: largest |computed - expected|; infinite for another shape, NaN without a computed array.
    tolerance: as the manifest writes it.
    excess: largest error in units of the allowed error; at most 1 passes.
    relative: |computed - expected| / |expected| with Euclidean norms over the array: how far a
      lower precision is from float32, whatever the tolerance; NaN without a computed array.
    finite: whether all computed numbers are.
  """

  case: str
  name: str
  error: float
  tolerance: float | str
  excess: float
  relative: float
  finite: bool

  def passes(self, scale: float = 1.0) -> bool:
    """Returns whether the error stays within `scale` times the tolerance."""
    return self.finite and self.excess <= scale


def check(golden: goldens.Golden, case: str) -> Iterator[Verdict]:
  """Runs a case.

  Args:
    golden: the folder of goldens.
    case: name of the case.

  Yields:
    A verdict for every computed array and for every output that the case does not compute.
  """
  function = function_of(case)
  missing = dict(golden.outputs(case))
  if function is None and not missing:
    missing = {"(unknown case)": "exact"}
  for result in function(golden, case) if function else ():
    missing.pop(result.name, None)
    expected = result.expected
    tolerance = result.tolerance
    if expected is None:
      expected = golden.arrays(case)[result.name]
      tolerance = golden.manifest[case]["arrays"][result.name]["tol"]
    yield _compare(case, result.name, result.value, expected, tolerance)
  for name, tolerance in missing.items():
    yield Verdict(case, name, np.nan, tolerance, np.inf, np.nan, True)


def function_of(case: str) -> results.Case | None:
  """Returns the function that computes a case, None where r3jax does not have it."""
  for pattern, function in CASES.items():
    if re.fullmatch(pattern, case):
      return function
  return None


def _compare(
  case: str, name: str, value: Any, expected: np.ndarray, tolerance: float | str
) -> Verdict:
  value = np.asarray(value)
  expected = np.asarray(expected)
  if value.shape != expected.shape:
    return Verdict(case, name, np.inf, tolerance, np.inf, np.inf, True)
  value = value.astype(np.float64)
  expected = expected.astype(np.float64)
  error = np.abs(value - expected)
  allowed = tolerances.allowed(tolerance, expected)
  with np.errstate(divide="ignore", invalid="ignore"):
    excess = np.where(error == 0, 0.0, error / allowed)
    distance = np.linalg.norm(error)
    relative = distance / np.linalg.norm(expected) if distance else 0.0
  return Verdict(
    case=case,
    name=name,
    error=float(error.max(initial=0.0)),
    tolerance=tolerance,
    excess=float(excess.max(initial=0.0)),
    relative=float(relative),
    finite=bool(np.isfinite(value).all()),
  )

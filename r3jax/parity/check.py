"""Runs the cases of a folder and compares what they compute with what is recorded."""

from collections.abc import Iterator
import dataclasses
import re

import numpy as np

from r3jax.parity import flow
from r3jax.parity import goldens
from r3jax.parity import language
from r3jax.parity import perception
from r3jax.parity import rules
from r3jax.parity import seen as seen_lib
from r3jax.parity import tolerance as tolerance_lib
from r3jax.parity import training

CASES: dict[str, seen_lib.Case] = {  # by the pattern of a case's name
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
    case, name: of the array.
    error: the largest |seen - expected|; infinite for another shape, NaN where nothing was computed.
    tolerance: as the manifest writes it.
    excess: the largest error divided by what is allowed there; at most 1 passes.
    finite: whether all computed numbers are.
  """

  case: str
  name: str
  error: float
  tolerance: float | str
  excess: float
  finite: bool

  def passes(self, scale: float = 1.0) -> bool:
    """Returns whether the error stays within `scale` times the tolerance."""
    return self.finite and self.excess <= scale


def _compare(
  case: str, name: str, value, expected: np.ndarray, tolerance: float | str
) -> Verdict:
  value, expected = np.asarray(value), np.asarray(expected)
  if value.shape != expected.shape:
    return Verdict(case, name, np.inf, tolerance, np.inf, True)
  value, expected = value.astype(np.float64), expected.astype(np.float64)
  error = np.abs(value - expected)
  with np.errstate(divide="ignore", invalid="ignore"):
    excess = np.where(
      error == 0, 0.0, error / tolerance_lib.allowed(tolerance, expected)
    )
  finite = bool(np.isfinite(value).all())
  return Verdict(
    case,
    name,
    float(error.max(initial=0.0)),
    tolerance,
    float(excess.max(initial=0.0)),
    finite,
  )


def function_of(case: str) -> seen_lib.Case | None:
  """Returns what computes a case, None where r3jax does not know it."""
  return next(
    (
      function
      for pattern, function in CASES.items()
      if re.fullmatch(pattern, case)
    ),
    None,
  )


def check(golden: goldens.Golden, case: str) -> Iterator[Verdict]:
  """Runs a case and yields a verdict for everything it computes and for every output it does not."""
  function, left = function_of(case), dict(golden.outputs(case))
  for seen in function(golden, case) if function else ():
    left.pop(seen.name, None)
    if seen.expected is None:
      tolerance = golden.manifest[case]["arrays"][seen.name]["tol"]
      yield _compare(
        case, seen.name, seen.value, golden.arrays(case)[seen.name], tolerance
      )
    else:
      yield _compare(case, seen.name, seen.value, seen.expected, seen.tolerance)
  if function is None and not left:
    left = {"(unknown case)": "exact"}
  for name, tolerance in left.items():
    yield Verdict(case, name, np.nan, tolerance, np.inf, True)

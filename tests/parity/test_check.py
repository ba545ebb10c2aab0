"""The goldens: every case at the manifest's tolerances; and that a check can fail."""

import json
import re
import shutil

import numpy as np
import pytest

from r3jax.parity import check
from r3jax.parity import goldens
from r3jax.parity import tolerance
from r3jax.parity import training
from tests import goldens_lib

GOLDEN = goldens_lib.GOLDEN


def _together(case: str) -> str:
  """Returns the name of a test: cases j and k of a stage share what takes long to compile."""
  scored = re.fullmatch(r"(?:j_pack|k_loss)_(gen|edit)(?:_\w+)?", case)
  return f"training_{scored[1]}" if scored else case


@pytest.mark.parametrize(
  "test", dict.fromkeys(_together(case) for case in GOLDEN.manifest)
)
def test_cases_pass(test):
  for case in (case for case in GOLDEN.manifest if _together(case) == test):
    verdicts = list(check.check(GOLDEN, case))
    assert verdicts and {name for name, _ in GOLDEN.outputs(case)} <= {
      verdict.name for verdict in verdicts
    }
    failed = [verdict for verdict in verdicts if not verdict.passes()]
    assert not failed, failed
  if test.startswith("training"):
    _assert_on_policy(f"k_loss_{test.removeprefix('training_')}_consistent")


def _assert_on_policy(case: str):
  """Asserts that ratios are 1 for what was sampled."""
  found, _, _ = training.outcome(GOLDEN, case)
  assert (
    float(found.texts.mismatch) < 1e-4 and float(found.images.mismatch) < 1e-3
  )
  assert int(found.texts.num_clipped) == int(found.images.num_clipped) == 0


@pytest.fixture
def changed(tmp_path):
  """Returns a copy of the goldens without weights, in which `change(arrays)` worked on a case."""

  def change(case: str, work) -> goldens.Golden:
    folder = tmp_path / "goldens"
    shutil.copytree(
      GOLDEN.folder, folder, ignore=shutil.ignore_patterns("*.safetensors")
    )
    arrays = dict(GOLDEN.arrays(case))
    work(arrays)
    np.savez(folder / f"{case}.npz", **arrays)
    return goldens.Golden(folder)

  return change


class TestCheck:
  def _failed(self, golden, case) -> list[str]:
    return [
      verdict.name
      for verdict in check.check(golden, case)
      if not verdict.passes()
    ]

  def test_a_number_beyond_its_tolerance_fails(self, changed):
    def push(arrays):
      arrays["log_prob"] = arrays["log_prob"] * (1 + 3e-4)

    assert self._failed(changed("h_sde_math", push), "h_sde_math") == [
      "log_prob"
    ]

  def test_another_shape_fails(self, changed):
    def cut(arrays):
      arrays["kl"] = arrays["kl"][:-1]

    assert self._failed(changed("h_sde_math", cut), "h_sde_math") == ["kl"]

  def test_an_output_that_is_not_computed_fails(self, changed):
    golden = changed("j_mask", lambda arrays: None)
    manifest = json.loads((golden.folder / "manifest.json").read_text())
    manifest["j_mask"]["arrays"]["another"] = {"role": "output", "tol": 1e-5}
    (golden.folder / "manifest.json").write_text(json.dumps(manifest))
    (failed,) = [
      verdict
      for verdict in check.check(golden, "j_mask")
      if not verdict.passes()
    ]
    assert failed.name == "another" and np.isnan(failed.error)

  def test_an_unknown_case_fails(self, changed):
    golden = changed("j_mask", lambda arrays: None)
    manifest = {"z_new": {"file": "z_new.json"}}
    (golden.folder / "manifest.json").write_text(json.dumps(manifest))
    assert self._failed(goldens.Golden(golden.folder), "z_new") == [
      "(unknown case)"
    ]


class TestVerdict:
  def test_what_is_not_finite_fails_at_any_scale(self):
    found = check._compare(
      "case", "array", np.array([1.0, np.nan]), np.array([1.0, 1.0]), 1e-3
    )
    assert not found.passes(np.inf)

  def test_relative_error_is_that_of_the_whole_array(self):
    expected = np.array([3.0, 4.0])
    verdict = check._compare("case", "array", expected + [0, 0.5], expected, 1)
    assert verdict.relative == 0.1
    zeros = np.zeros(2)
    assert check._compare("case", "array", zeros, zeros, 1).relative == 0

  def test_scale_widens_the_tolerance(self):
    found = check._compare(
      "case", "array", np.array([1.002]), np.array([1.0]), 1e-3
    )
    assert not found.passes() and found.passes(3.0)


class TestAllowed:
  @pytest.mark.parametrize(
    "written, expected",
    [
      (0.5, 0.5),
      ("exact", 0.0),
      ("<=1 level", 1.0),
      ("rtol 1e-2, atol 1e-3", [0.021, 0.001]),
      ("rtol 1e-2 of max|grad|", 0.02),
    ],
  )
  def test_reads_the_manifests_grammar(self, written, expected):
    np.testing.assert_allclose(
      tolerance.allowed(written, np.array([-2.0, 0.0])), expected
    )

  def test_a_relative_tolerance_does_not_vanish_at_zero(self):
    assert 0 < tolerance.allowed("rtol 1e-2", np.zeros(1))[0] <= 1e-6

  def test_refuses_another_grammar(self):
    with pytest.raises(ValueError, match="got 'about right'"):
      tolerance.allowed("about right", np.zeros(1))

"""A folder with images that are not square: both versions of its numbers, and Pillow 13's resize.

The folder is r3jax's own, see `tests/record_goldens.py`.
"""

import json

import numpy as np
import PIL.Image
import pytest

from r3jax.parity import check
from r3jax.parity import goldens
from r3jax.parity import training
from tests import record_goldens

GOLDEN = goldens.Golden(record_goldens.FOLDER)
# Of 3 rows and 5 columns in a table of 8 columns, and of 5 rows and 3 columns.
RIGHT_IDS = [0, 1, 2, 3, 4, 8, 9, 10, 11, 12, 16, 17, 18, 19, 20]
TRANSPOSED_IDS = [0, 1, 2, 8, 9, 10, 16, 17, 18, 24, 25, 26, 32, 33, 34]


def _failed(golden: goldens.Golden, case: str) -> list[check.Verdict]:
  """Returns the verdicts that do not pass."""
  verdicts = list(check.check(golden, case))
  recorded = {name for name, _ in golden.outputs(case)}
  assert recorded <= {verdict.name for verdict in verdicts}
  return [verdict for verdict in verdicts if not verdict.passes()]


# Cases that another case has the parts of.
LONG_CASES = ("e_reflect",)


@pytest.mark.parametrize(
  "case",
  [
    pytest.param(case, marks=[pytest.mark.slow] * (case in LONG_CASES))
    for case in GOLDEN.manifest
  ],
)
def test_cases_pass(case):
  assert not _failed(GOLDEN, case)


@pytest.mark.parametrize("stage", ["gen", "edit"])
def test_only_the_fixed_version_is_on_policy(stage):
  consistent, _, _ = training.outcome(GOLDEN, f"k_loss_{stage}_consistent")
  literal, _, _ = training.outcome(GOLDEN, f"k_loss_{stage}_onpolicy")
  assert float(consistent.images.mismatch) < 1e-6
  assert float(literal.images.mismatch) > 1e-5


def test_positions_of_copies_are_transposed_in_the_literal_version_alone():
  drafts = GOLDEN.arrays("j_pack_gen")
  literal = drafts["packed_latent_position_ids"].reshape(2, 2, -1)
  fixed = drafts["FIXED_packed_latent_position_ids"].reshape(2, 2, -1)
  for sample in range(2):
    np.testing.assert_array_equal(literal[sample], [RIGHT_IDS, TRANSPOSED_IDS])
    np.testing.assert_array_equal(fixed[sample], [RIGHT_IDS, RIGHT_IDS])
  # clean and noisy latents, the same without text, noisy latents without image
  edits = GOLDEN.arrays("j_pack_edit")
  shapes = edits["patchified_vae_latent_shapes"].reshape(2, 5, 2)
  grids = [(3, 5), (3, 5), (3, 5), (5, 3), (5, 3)]
  np.testing.assert_array_equal(shapes, [grids, grids])


@pytest.mark.parametrize("stage, num_branches", [("gen", 2), ("edit", 3)])
def test_velocities_of_the_full_context_are_those_of_both_versions(
  stage, num_branches
):
  pack = GOLDEN.arrays(f"j_pack_{stage}")
  literal = pack["packed_mse_preds"].reshape(2, num_branches, 15, -1)
  fixed = pack["FIXED_packed_mse_preds"].reshape(2, num_branches, 15, -1)
  difference = np.abs(literal - fixed).max(axis=(0, 2, 3))
  assert difference[0] < 1e-5
  assert (difference[1:] > 1e-2).all()


@pytest.fixture(scope="module")
def recorded_by_pillow(tmp_path_factory):
  """A folder with one case: a tall image, resized by the installed Pillow."""
  folder = tmp_path_factory.mktemp("pillow")
  for path in GOLDEN.folder.glob("*.json"):
    (folder / path.name).write_bytes(path.read_bytes())
  case = "n_resize_pixels"
  manifest = {case: GOLDEN.manifest[case]}
  (folder / "manifest.json").write_text(json.dumps(manifest))
  arrays = dict(GOLDEN.arrays(case))
  image = PIL.Image.fromarray(arrays["image"])
  for name in ("vae", "vit"):
    _, height, width = arrays[name].shape
    resized = image.resize((width, height), PIL.Image.Resampling.BICUBIC)
    unit = np.moveaxis(np.asarray(resized), -1, 0) / np.float32(255)
    arrays[name] = (unit - np.float32(0.5)) / np.float32(0.5)
  np.savez(folder / f"{case}.npz", **arrays)
  return folder


@pytest.mark.parametrize(
  "order, passes", [("cheaper_first", True), ("width_first", False)]
)
def test_numbers_of_pillow_13_need_its_order(recorded_by_pillow, order, passes):
  golden = goldens.Golden(recorded_by_pillow, resize_order=order)
  assert (not _failed(golden, "n_resize_pixels")) == passes

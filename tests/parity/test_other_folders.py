"""Another folder of the format: heads in another order, where nothing but the order may change."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy

from r3jax.parity import check
from r3jax.parity import goldens
from tests import goldens_lib

CASES = (
  "d_text",
  "e_reflect",
  "f_flow_gen",
  "f_flow_edit",
  "k_loss_gen_consistent",
)


def _order(config) -> tuple[np.ndarray, np.ndarray]:
  """Returns another order of the key/value heads, and of the query heads that follow from it.

  Query head h reads key/value head h // (H / K); inside a group any order will do.
  """
  llm = config.llm
  kv = np.arange(llm.num_kv_heads)[::-1]
  size = llm.num_heads // llm.num_kv_heads
  return kv, np.concatenate(
    [head * size + np.arange(size)[::-1] for head in kv]
  )


def _by_head(x: np.ndarray, order: np.ndarray, axis: int) -> np.ndarray:
  """Reorders blocks of equal size along an axis."""
  shape = (
    x.shape[:axis]
    + (len(order), x.shape[axis] // len(order))
    + x.shape[axis + 1 :]
  )
  return np.take(x.reshape(shape), order, axis).reshape(x.shape)


def _permuted(
  name: str, x: np.ndarray, kv: np.ndarray, query: np.ndarray
) -> np.ndarray:
  """Returns a released parameter (or its gradient) of the model with permuted heads."""
  part = next(
    (
      part
      for part in ("q_proj", "k_proj", "v_proj", "o_proj")
      if f".{part}" in name
    ),
    None,
  )
  if part is None or "vit_model" in name:
    return x
  order = query if part in ("q_proj", "o_proj") else kv
  return _by_head(x, order, 1 if part == "o_proj" else 0)


@pytest.fixture(scope="module")
def permuted(tmp_path_factory):
  """The goldens of the same model with its heads in another order."""
  folder = tmp_path_factory.mktemp("permuted") / "goldens"
  shutil.copytree(goldens_lib.FOLDER, folder)
  kv, query = _order(goldens_lib.config())
  weights = safetensors.numpy.load_file(folder / "ema.safetensors")
  changed = {
    name: np.ascontiguousarray(_permuted(name, x, kv, query))
    for name, x in weights.items()
  }
  assert sum((changed[name] != weights[name]).any() for name in weights) > 20
  safetensors.numpy.save_file(changed, folder / "ema.safetensors")
  manifest = {case: goldens_lib.GOLDEN.manifest[case] for case in CASES}
  manifest |= {
    name: goldens_lib.GOLDEN.manifest[name] for name in ("j_pack_gen",)
  }
  (folder / "manifest.json").write_text(json.dumps(manifest))
  for case in CASES:
    arrays = dict(goldens_lib.case(case))
    for name in arrays:
      if name.startswith("grad::"):
        arrays[name] = _permuted(name, arrays[name], kv, query)
      elif name in ("prefill0_k_layer0", "prefill0_v_layer0"):
        arrays[name] = arrays[name][:, kv]
    np.savez(folder / f"{case}.npz", **arrays)
  return goldens.Golden(folder)


@pytest.mark.parametrize("case", CASES)
def test_permuted_heads_give_the_recorded_numbers(permuted, case):
  failed = [
    verdict for verdict in check.check(permuted, case) if not verdict.passes()
  ]
  assert not failed, failed


def test_permuting_key_heads_alone_is_noticed(permuted, tmp_path):
  folder = tmp_path / "goldens"
  shutil.copytree(permuted.folder, folder)
  weights = safetensors.numpy.load_file(folder / "ema.safetensors")
  kv, _ = _order(permuted.config)
  name = "language_model.model.layers.0.self_attn.k_proj.weight"
  weights[name] = np.ascontiguousarray(_by_head(weights[name], kv, 0))
  safetensors.numpy.save_file(weights, folder / "ema.safetensors")
  assert not all(
    verdict.passes()
    for verdict in check.check(goldens.Golden(folder), "d_text")
  )

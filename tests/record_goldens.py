"""Records tests/goldens/tiny-a-48x80: the model of tiny-a with images that are not square.

  python -m tests.record_goldens

The numbers are r3jax's own, so that the folder shows changes, not errors. Its format is that of
tiny-a, with both versions of what the reference computes for images that are not square (see
`r3jax/parity/training.py`). Texts, scales and weights are those of tiny-a; images and noise are
drawn anew. Files come out the same byte by byte on the same machine.
"""

import dataclasses
import functools
import json
import pathlib
import re

import jax
import numpy as np

from r3jax.parity import check
from r3jax.parity import goldens

FOLDER = pathlib.Path(__file__).parent / "goldens" / "tiny-a-48x80"
TEMPLATE = FOLDER.parent / "tiny-a"
SIZE = (48, 80)  # height and width
NUM_POINTS = 4  # of every trajectory
# of the image of n_resize_pixels; so tall that the order of the passes matters
TALL_SIZE = (200, 40)
SHARED_FILES = (  # linked
  "ae.safetensors",
  "ema.safetensors",
  "llm_config.json",
  "vit_config.json",
)
CASES = (
  "e_reflect",
  "g_ode_gen",
  "g_ode_edit",
  "j_pack_gen",
  "j_pack_edit",
  "j_pack_multi",
  "k_loss_gen_consistent",
  "k_loss_gen_onpolicy",
  "k_loss_edit_consistent",
  "k_loss_edit_onpolicy",
  "n_resize_pixels",
)
PACKS = ("j_pack_gen", "j_pack_edit")
# Inputs that r3jax reads of a pack; it makes the packed order from layouts.
PACK_INPUTS = re.compile(
  "(system|reflection|prompt|edit|generated)_ids.*|image|latents_.*|t_dt_.*"
  "|total_.*|scales|constant_eta|in_.*_advantages"
)
RECORDED_ROWS = 8  # of every gradient
GRADIENTS = (
  "connector.fc1.weight",
  "language_model.model.layers.0.self_attn.q_proj.weight",
  "language_model.model.layers.0.self_attn.q_proj_moe_gen.weight",
  "language_model.model.norm_moe_gen.weight",
  "llm2vae.weight",
  "vae2llm.weight",
)
BOTH_VERSIONS = (
  "packed_latent_position_ids",
  "FIXED_packed_latent_position_ids",
  "patchified_vae_latent_shapes",
)
NOTES = {
  "patchified_vae_latent_shapes": "(h, w) per latent image; (w, h) of the copies for guidance",
  "packed_latent_position_ids": "2D position id per latent token; transposed in the copies",
  "packed_mse_preds": "velocity for every noisy latent token, at the literal positions",
  "FIXED_packed_latent_position_ids": "2D position id per latent token, (h, w) everywhere",
  "FIXED_packed_mse_preds": "velocity for every noisy latent token, at the FIXED_ positions",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Recording(goldens.Golden):
  """A folder in the making.

  Attributes:
    cases: arrays by case; the functions of the cases read those that are there.
  """

  cases: dict[str, dict[str, np.ndarray]] = dataclasses.field(
    default_factory=dict
  )
  # By identity: what is cached of one recording must not serve another of the same folder.
  __eq__ = object.__eq__
  __hash__ = object.__hash__

  def arrays(self, case: str) -> dict[str, np.ndarray]:
    """Returns the arrays of a case so far."""
    return self.cases[case]

  @functools.cached_property
  def num_tokens(self) -> int:
    """Latent tokens of an image."""
    rows, columns = self.towers().latent_grid
    return rows * columns

  def compute(self, case: str):
    """Computes the outputs of a case into its arrays."""
    function = check.function_of(case)
    assert function is not None
    for result in function(self, case):
      if result.expected is None:
        # At once: later results read earlier ones.
        self.cases[case][result.name] = np.asarray(result.value)


def _image(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
  """Returns an 8-bit image of random squares, which a file compresses well."""
  side = 8
  height, width = size
  squares = rng.integers(0, 4, (height // side, width // side, 3)) * 85
  return squares.repeat(side, axis=0).repeat(side, axis=1).astype(np.uint8)


def _noise(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
  return rng.standard_normal(shape, np.float32)


def _inputs(
  recording: Recording,
  template: goldens.Golden,
  case: str,
  rng: np.random.Generator,
) -> dict[str, np.ndarray]:
  """Returns the inputs of a case, and outputs that its function only reads the shape of."""
  arrays = {}
  described = template.manifest[case]["arrays"]
  for name, array in template.arrays(case).items():
    if described[name]["role"] == "output":
      continue
    if case in PACKS and not PACK_INPUTS.fullmatch(name):
      continue
    if name.startswith("image"):
      array = _image(TALL_SIZE if case == "n_resize_pixels" else SIZE, rng)
    elif name == "initial_noise":
      array = _noise((recording.num_tokens, array.shape[-1]), rng)
    elif name.startswith("latents_"):
      before = _noise((recording.num_tokens, array.shape[-1]), rng)
      array = np.stack([before, before + 0.3 * _noise(before.shape, rng)])
    arrays[name] = array
  if case == "e_reflect":
    arrays["decode_logits"] = template.arrays(case)["decode_logits"]
  elif case.startswith("g_"):
    arrays["timesteps"] = np.zeros(NUM_POINTS)
  elif case == "j_pack_multi":
    arrays |= _times_and_advantages(recording, template.arrays(case))
  elif case in PACKS:
    names = (*BOTH_VERSIONS, "FIXED_packed_mse_preds")
    arrays |= dict.fromkeys(names, np.zeros(0))
  elif case.startswith("k_"):
    arrays["grad_names"] = template.arrays(case)["grad_names"]
    if case.endswith("consistent"):
      for name in GRADIENTS:
        if f"grad::{name}" in described:
          arrays[f"grad::{name}"] = np.zeros(RECORDED_ROWS)
  return arrays


def _times_and_advantages(
  recording: Recording, template: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
  """Returns what the case j_pack_multi takes from its outputs."""
  grid = recording.towers().latent_grid
  num_tokens_before = template["patchified_vae_latent_shapes"][0].prod()
  arrays = {
    "patchified_vae_latent_shapes": np.array([grid]),
    "FIXED_packed_latent_position_ids": np.zeros(0),
  }
  for name in ("loss_text_advantages", "loss_image_advantages"):
    arrays[name] = template[name]
  for name in ("loss_dts", "loss_packed_timesteps_for_loss"):
    images = template[name][::num_tokens_before]
    arrays[name] = images.repeat(recording.num_tokens)
  return arrays


def _set_behavior(recording: Recording):
  """Sets the behavior log-probs of the k cases to those of the scored rollouts."""
  # Scores do not depend on them; a recording of its own keeps what it caches apart.
  rehearsal = Recording(
    recording.folder,
    cases={case: dict(arrays) for case, arrays in recording.cases.items()},
  )
  for stage in ("gen", "edit"):
    pack = rehearsal.cases[f"j_pack_{stage}"]
    num_scored = sum(
      len(ids) - 2
      for name, ids in pack.items()
      if name.startswith("generated_ids")
    )
    behaviors = {
      "inference_probs": np.ones(num_scored, np.float32),
      "behavior_log_probs": np.zeros(2 * rehearsal.num_tokens, np.float32),
    }
    variants = [f"k_loss_{stage}_{v}" for v in ("consistent", "onpolicy")]
    for case in variants:
      rehearsal.cases[case] |= behaviors
    rehearsal.compute(f"j_pack_{stage}")
    for case in variants:
      recording.cases[case]["inference_probs"] = np.exp(pack["token_logps"])
      recording.cases[case]["behavior_log_probs"] = pack["FIXED_log_prob"]


def _manifest(recording: Recording, template: goldens.Golden) -> dict:
  """Returns the manifest: descriptions and tolerances are those of the template."""
  manifest = {}
  for case, arrays in recording.cases.items():
    known = template.manifest[case]
    entries = {}
    for name, array in arrays.items():
      # tiny-a does not have the FIXED_ version of what is the same in square images.
      key = name if name in known["arrays"] else name.removeprefix("FIXED_")
      entry = dict(known["arrays"][key])
      entry |= {"shape": list(array.shape), "dtype": str(array.dtype)}
      if name in BOTH_VERSIONS:
        entry["role"] = "output"
      if name in NOTES:
        entry["desc"] = NOTES[name]
      entries[name] = entry
    manifest[case] = {
      "summary": known["summary"],
      "file": f"{case}.npz",
      "arrays": entries,
    }
  return manifest


def main():
  """Writes the folder."""
  jax.config.update("jax_default_matmul_precision", "highest")
  template = goldens.Golden(TEMPLATE)
  FOLDER.mkdir(exist_ok=True)
  for name in SHARED_FILES:
    link = FOLDER / name
    link.unlink(missing_ok=True)
    link.symlink_to(f"../{TEMPLATE.name}/{name}")
  constants = template.constants | {
    "image_hw": list(SIZE),
    "ode_points": NUM_POINTS,
  }
  (FOLDER / "constants.json").write_text(json.dumps(constants, indent=1) + "\n")

  recording = Recording(FOLDER)
  rng = np.random.default_rng(0)
  for case in CASES:
    recording.cases[case] = _inputs(recording, template, case, rng)
  _set_behavior(recording)
  for case, arrays in recording.cases.items():
    recording.compute(case)
    np.savez_compressed(FOLDER / f"{case}.npz", **arrays)
  manifest = _manifest(recording, template)
  (FOLDER / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


if __name__ == "__main__":
  main()

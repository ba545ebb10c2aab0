"""Edits an image file, or answers a question about it."""

import json

from etils import epath
import ml_collections
import numpy as np

from r3jax import inference
from r3jax.files import config_guard
from r3jax.files import image_files
from r3jax.files import ownership
from r3jax.model import preprocess

FACTS = "edit.json"


def read_image(path: str) -> np.ndarray:
  """Returns an image file as uint8 [H, W, 3], as a viewer shows it.

  Raises:
    ValueError: it cannot be read.
  """
  try:
    return image_files.read(path)
  except ValueError as error:
    raise ValueError(f"--image must be an image file: {error}") from error


@ownership.releasing()
def edit(
  config: ml_collections.ConfigDict,
  image_path: str,
  instruction: str,
  num_images: int,
  folder: epath.Path,
  program_folder: epath.Path | None = None,
) -> list[epath.Path]:
  """Edits an image a number of times; returns the paths of edit_00.png, edit_01.png, ...

  Args:
    config: as for `inference.load`; `image` is set to the size nearest to the file's.
    image_path: of an image file.
    instruction: how to edit it.
    num_images: number of edits.
    folder: gets the edits and edit.json; must not hold any.
    program_folder: see `inference.load`.

  Raises:
    ValueError: the image, the instruction, the config or the folder cannot be used.
  """
  image = inference.fit(config, read_image(image_path))
  if (folder / FACTS).exists():
    raise ValueError(
      f"edits are never overwritten: choose another --out than {folder}"
    )
  base, _ = inference.prepare(config)
  # Raises an error where the instruction does not fit its segment.
  base.segments([instruction], base.rollout.capacities.instruction)
  config_guard.check_writable(folder, "--out")
  ownership.claim(folder)
  model = inference.load(config, program_folder=program_folder)
  edits = model.edit(image, instruction, num_images, config.eval.seed)
  paths = []
  for number, edited in enumerate(edits):
    path = folder / f"edit_{number:02d}.png"
    path.write_bytes(preprocess.png(edited))
    paths.append(path)
  facts = {
    "image": image_path,
    "instruction": instruction,
    "seed": config.eval.seed,
    "model": config.model.folder,
    "size": list(image.shape[:2]),
    "edits": [path.name for path in paths],
  }
  (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n")
  return paths


def ask(
  config: ml_collections.ConfigDict,
  image_path: str,
  question: str,
  program_folder: epath.Path | None = None,
) -> str:
  """Returns the model's answer to a question about an image file.

  Raises:
    ValueError: the image, the question or the config cannot be used.
  """
  image = inference.fit(config, read_image(image_path))
  model = inference.load(config, program_folder=program_folder)
  return model.ask(image, question, config.eval.seed)

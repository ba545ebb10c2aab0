"""Draws images with the R3 loop: think, draft, look, say what is wrong, edit.

  python launch/generate.py --prompt="a photo of a red ring and a blue bow" --out=DIR
  python launch/generate.py --prompts=FILE --out=DIR      # a prompt per line, or GenEval's JSON lines
  python launch/generate.py --image=FILE --instruction="add a green heart at top" --out=DIR
  python launch/generate.py --image=FILE --question="what is there ?"

The model is the small one of the package unless --model names another: a folder in BAGEL's format, a
converted one, or the workdir of a run. --out gets a PNG file per round, a JSON file per sample, and
index.html. Started again with the same arguments, it goes on where it stopped.
"""

from collections.abc import Iterator
import json
import os
import sys

from absl import app
from absl import flags
from absl import logging
from etils import epath
import jax
import ml_collections
from ml_collections import config_flags
import numpy as np
import PIL.Image
import tqdm

from r3jax import inference
from r3jax.io import config_guard
from r3jax.io import gallery
from r3jax.io import images as images_lib
from r3jax.rewards import shapes as shapes_reward
from r3jax.worlds import prompts as world_prompts

_MODEL = flags.DEFINE_string("model", None, "Folder of the model. Default: what the config names.")
_CONFIG = config_flags.DEFINE_config_file(
    "config", os.path.join(os.path.dirname(__file__), "../configs/r3_geneval.py:shapes"),
    "Config file; without :shapes for BAGEL-7B.", lock_config=True,
)
_PROMPT = flags.DEFINE_string("prompt", None, "What to draw.")
_PROMPTS = flags.DEFINE_string("prompts", None, "File of prompts: lines of text, or of JSON with a key 'prompt'.")
_ROUNDS = flags.DEFINE_integer("rounds", 4, "Rounds at most, the draft included.", lower_bound=1)
_NUM_IMAGES = flags.DEFINE_integer("num_images", 4, "Images per prompt, or edits of --image.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of all randomness.")
_POINTS = flags.DEFINE_integer("points", 50, "Points of the ODE.", lower_bound=2)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.3, "Of texts.", lower_bound=0)
_IMAGE = flags.DEFINE_string("image", None, "Image file to edit, or to ask about.")
_INSTRUCTION = flags.DEFINE_string("instruction", None, "How to edit --image.")
_QUESTION = flags.DEFINE_string("question", None, "What to ask about --image.")
_OUT = flags.DEFINE_string("out", None, "Folder to write.")

_MAY_DIFFER = ("mesh", "num_images", "log", "checkpoint", "total_steps", "data")


class Steps:
  """A progress bar over the steps of sampling an image."""

  def __init__(self, steps: int):
    self._steps, self._bar = steps, None

  def __call__(self, step: np.ndarray):
    """Notes that a step begins; steps may be told out of order."""
    if self._bar is None:
      self._bar = tqdm.tqdm(total=self._steps, desc="drawing", leave=False, disable=None)
    self._bar.update(1)
    if self._bar.n >= self._steps:
      self._bar.close()
      self._bar = None


def _settings() -> ml_collections.ConfigDict:
  """Returns the config with the flags in it."""
  config = _CONFIG.value
  if _MODEL.value:
    config.model.folder = _MODEL.value
  config.eval.update(points=_POINTS.value, temperature=_TEMPERATURE.value, seed=_SEED.value, rounds=_ROUNDS.value)
  return config


def _records() -> list[dict]:
  """Returns what to draw: objects with a "prompt", and with "include" where it can be scored.

  Raises:
    ValueError: the file is missing or has a line that is no prompt.
  """
  if _PROMPT.value:
    return [{"prompt": _PROMPT.value}]
  path = epath.Path(_PROMPTS.value)
  if not path.is_file():
    raise ValueError(f"--prompts must be a file; not found: {path}")
  lines = [line for line in path.read_text().splitlines() if line.strip()]
  records = [json.loads(line) if line.startswith("{") else {"prompt": line.strip()} for line in lines]
  bad = [line for line, record in zip(lines, records) if not isinstance(record.get("prompt"), str)]
  if bad or not records:
    raise ValueError(f"--prompts must hold prompts; {path} has {bad[0] if bad else 'none'}")
  return records


def _scores(config: ml_collections.ConfigDict, record: dict, images: np.ndarray) -> list[float | None]:
  """Returns the verifier's score of every image where the world knows the prompt, else None."""
  known = {one["prompt"]: one for one in (*world_prompts.train_records(), *world_prompts.heldout_records())}
  record = record if "include" in record else known.get(record["prompt"])
  if config.reward.name != "shapes" or record is None:
    return [None] * len(images)
  target = jax.tree.map(lambda x: np.repeat(x, len(images), axis=0), shapes_reward.encode_records([record]))
  return [float(value) for value in jax.jit(shapes_reward.verify)(images, target).value]


def _facts(config, record: dict, number: int, image: int, sample: inference.Sample) -> dict:
  images = np.stack([turn.image for turn in sample.turns])
  turns = [
      {"text": turn.text, "instruction": turn.instruction, "stop": turn.stop, "score": score,
       "seconds": round(turn.seconds, 3)}
      for turn, score in zip(sample.turns, _scores(config, record, images))
  ]
  return {"prompt": sample.prompt, "prompt_number": number, "image_number": image, "seed": _SEED.value,
          "model": config.model.folder, "size": list(images.shape[1:3]), "turns": turns}


def _missing(records: list[dict], folder: epath.Path) -> Iterator[tuple[int, dict]]:
  """Yields the prompts, with their numbers, that lack an image."""
  for number, record in enumerate(records):
    names = (gallery.name_of(number, image) for image in range(_NUM_IMAGES.value))
    if not all(gallery.is_there(folder, name) for name in names):
      yield number, record


def draw(config: ml_collections.ConfigDict):
  """Draws what is missing in --out, and writes the page."""
  folder, records = epath.Path(_OUT.value), _records()
  model = inference.load(config, on_step=Steps(config.eval.points - 1))
  config_guard.check_writable(folder)
  facts = {"num_images": _NUM_IMAGES.value, "prompts": records, "weights": model.base.pretrained.fingerprint()}
  config_guard.write_or_check(folder, config.to_dict() | facts, _MAY_DIFFER)
  for number, record in _missing(records, folder):
    print(f"\n{record['prompt']}")
    tell = lambda image, turn, text: print(f"  image {image + 1}, {f'round {turn + 1}' if turn else 'draft'}: {text}")
    samples = model.generate(record["prompt"], _NUM_IMAGES.value, _ROUNDS.value, _SEED.value, number, tell)
    for image, sample in enumerate(samples):
      name = gallery.name_of(number, image)
      gallery.write(folder, name, _facts(config, record, number, image, sample), [turn.image for turn in sample.turns])
  print(f"\npage: {gallery.write_page(folder, f'R3: {len(records)} prompts')}")


def _read_image(config: ml_collections.ConfigDict) -> np.ndarray:
  """Returns --image at a size that the model takes, and sets the config to it."""
  image = np.asarray(PIL.Image.open(_IMAGE.value).convert("RGB"))
  return inference.fit(config, image)


def revise(config: ml_collections.ConfigDict):
  """Edits --image, or asks about it."""
  image = _read_image(config)
  model = inference.load(config, on_step=Steps(config.eval.points - 1) if _INSTRUCTION.value else None)
  if _QUESTION.value:
    print(model.ask(image, _QUESTION.value, _SEED.value))
    return
  config_guard.check_writable(_OUT.value)
  for i, edited in enumerate(model.edit(image, _INSTRUCTION.value, _NUM_IMAGES.value, _SEED.value)):
    path = epath.Path(_OUT.value) / f"edit_{i:02d}.png"
    path.write_bytes(images_lib.png(edited))
    print(path)


def _check_flags():
  """Raises ValueError unless exactly one thing is asked for, with all that it needs."""
  asked = {name: flag.value for name, flag in
           {"prompt": _PROMPT, "prompts": _PROMPTS, "instruction": _INSTRUCTION, "question": _QUESTION}.items()}
  given = [f"--{name}" for name, value in asked.items() if value]
  if len(given) != 1:
    raise ValueError(f"one of {', '.join('--' + name for name in asked)} must be given; got {given or 'none'}")
  if bool(_IMAGE.value) != (given[0] in ("--instruction", "--question")):
    raise ValueError("--instruction and --question need --image, and only they do")
  if not _OUT.value and given[0] != "--question":
    raise ValueError("--out must name the folder to write")


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  logging.set_verbosity(logging.WARNING)
  try:
    _check_flags()
    config = _settings()
    (revise if _IMAGE.value else draw)(config)
  except ValueError as error:
    sys.exit(f"r3jax: {error}")


if __name__ == "__main__":
  app.run(main)

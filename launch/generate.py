"""Draws images with the R3 loop: think, draft, look, say what is wrong, edit.

  python launch/generate.py --prompt="a photo of a red ring and a blue bow" --out=DIR
  python launch/generate.py --prompts=FILE --out=DIR      # a prompt per line, or GenEval's JSON lines
  python launch/generate.py --image=FILE --instruction="add a green heart at top" --out=DIR
  python launch/generate.py --image=FILE --question="what is there ?"

The model is the small one of the package unless --model names another: a folder in BAGEL's format, a
converted one, or the workdir of a run. For prompts, --out gets a PNG file per round, a JSON file per
image, and index.html; started again with the same arguments, the command goes on where it stopped.
For edits it gets edit_00.png, ... and edit.json.
"""

import importlib.util
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
from r3jax.checkpoint import pretrained
from r3jax.data import records
from r3jax.files import config_guard
from r3jax.model import preprocess
from r3jax.report import gallery
from r3jax.run import model_setup
from r3jax.worlds import base as worlds_base
from r3jax.worlds import registry

# config files import each other
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

_MODEL = flags.DEFINE_string(
  "model", None, "Folder of the model. Default: the small one of the package."
)
_CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "Config file, to set more than the flags do; its eval.* are the defaults of the flags then. Default: configs/r3_geneval.py, with :shapes where "
  "the model's vocabulary is that of the embedded world.",
  lock_config=True,
)
_PROMPT = flags.DEFINE_string("prompt", None, "What to draw.")
_PROMPTS = flags.DEFINE_string(
  "prompts",
  None,
  "File of prompts: lines of text, or of JSON with a key 'prompt'.",
)
flags.DEFINE_integer(
  "rounds",
  None,
  "Rounds at most, the draft included. Default: 4.",
  lower_bound=1,
)
_NUM_IMAGES = flags.DEFINE_integer(
  "num_images", 4, "Images per prompt, or edits of --image.", lower_bound=1
)
flags.DEFINE_integer("seed", None, "Of all randomness. Default: 0.")
flags.DEFINE_integer(
  "points", None, "Points of the ODE. Default: 50.", lower_bound=2
)
flags.DEFINE_float(
  "temperature", None, "Of texts. Default: 0.3.", lower_bound=0
)
_IMAGE = flags.DEFINE_string(
  "image", None, "Image file to edit, or to ask about."
)
_INSTRUCTION = flags.DEFINE_string("instruction", None, "How to edit --image.")
_QUESTION = flags.DEFINE_string("question", None, "What to ask about --image.")
_OUT = flags.DEFINE_string("out", None, "Folder to write.")

_CONFIGS = os.path.join(
  os.path.dirname(os.path.abspath(__file__)), "../configs/r3_geneval.py"
)
# of flags that stand for config.eval
_DEFAULTS = {"rounds": 4, "seed": 0, "points": 50, "temperature": 0.3}
_MAY_DIFFER = ("mesh", "num_images", "log", "checkpoint", "total_steps", "data")


class Steps:
  """A progress bar over the steps of sampling an image."""

  def __init__(self, steps: int):
    self._steps, self._bar = steps, None

  def __call__(self, unused_step: np.ndarray):
    """Notes that a step begins; steps may be told out of order."""
    if self._bar is None:
      self._bar = tqdm.tqdm(
        total=self._steps, desc="drawing", leave=False, disable=None
      )
    self._bar.update(1)
    if self._bar.n >= self._steps:
      self._bar.close()
      self._bar = None


def _variant_of(folder: str) -> str:
  """Returns the config's variant for a model: the world whose vocabulary it has, or "bagel".

  Raises:
    ValueError: the model cannot be read.
  """
  words = pretrained.find(folder).tokenizer.vocabulary
  for name in registry.REGISTERED:
    tokenizer = registry.find(name).tokenizer
    if tokenizer is not None and tokenizer().get_vocab() == words:
      return name
  return "bagel"


def _config() -> ml_collections.ConfigDict:
  """Returns the config with the flags in it.

  Raises:
    ValueError: the model cannot be read.
  """
  config = _CONFIG.value
  if config is None:
    variant = _variant_of(_MODEL.value) if _MODEL.value else "shapes"
    spec = importlib.util.spec_from_file_location("r3_geneval", _CONFIGS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(variant)
    config.eval.update(_DEFAULTS)
  if _MODEL.value:
    config.model.folder = _MODEL.value
  config.eval.update(
    {
      name: flags.FLAGS[name].value
      for name in _DEFAULTS
      if flags.FLAGS[name].value is not None
    }
  )
  return config


def _read_prompts() -> list[records.Prompt]:
  """Returns the prompts to draw, with `include` items where they can be scored.

  Raises:
    ValueError: the file is missing or has lines that are no prompts; lists them.
  """
  if _PROMPT.value:
    return [records.Prompt(tag="", text=_PROMPT.value)]
  path = epath.Path(_PROMPTS.value)
  if not path.is_file():
    raise ValueError(f"--prompts must be a file; not found: {path}")
  prompts = []
  problems = []
  for number, line in enumerate(path.read_text().splitlines(), start=1):
    if not line.strip():
      continue
    try:
      prompts.append(_parse_prompt(line.strip(), f"{path}:{number}"))
    except ValueError as error:
      problems.append(str(error))
  if problems or not prompts:
    raise ValueError(
      "--prompts must hold prompts:\n"
      + "\n".join(problems or [f"{path} has none"])
    )
  return prompts


def _parse_prompt(line: str, where: str) -> records.Prompt:
  """Returns the prompt of a line: a text, or a JSON object with at least the key "prompt".

  Raises:
    ValueError: the line is no such object; `where` names it in the message.
  """
  if not line.startswith("{"):
    return records.Prompt(tag="", text=line)
  try:
    obj = json.loads(line)
  except json.JSONDecodeError as error:
    raise ValueError(f"{where}: the line must be JSON: {error}") from error
  if not isinstance(obj.get("prompt"), str):
    raise ValueError(f"{where}: the object must have a text 'prompt'")
  if "include" not in obj:
    return records.Prompt(tag="", text=obj["prompt"])
  return records.Prompt.from_json({"tag": "none"} | obj, where)


def _targets(
  config: ml_collections.ConfigDict,
  world: worlds_base.World | None,
  prompts: list[records.Prompt],
) -> list[worlds_base.Target | None]:
  """Returns what the verifier compares with, where it is the reward and the world knows the prompt.

  Raises:
    ValueError: a prompt's `include` is not of this world.
  """
  if world is None or config.reward.name != registry.OF_WORLD:
    return [None] * len(prompts)
  world_prompts = {
    prompt.text: prompt
    for prompt in (*world.records("train"), *world.records("heldout"))
  }
  targets = []
  for prompt in prompts:
    if not prompt.include:
      prompt = world_prompts.get(prompt.text)
    targets.append(None if prompt is None else world.encode([prompt]))
  return targets


def _scores(
  world: worlds_base.World | None,
  target: worlds_base.Target | None,
  images: np.ndarray,
) -> list[float | None]:
  """Returns the verifier's score of every image, None without a target."""
  if target is None:
    return [None] * len(images)
  repeated = jax.tree.map(lambda x: np.repeat(x, len(images), axis=0), target)
  return [
    float(value) for value in jax.jit(world.verify)(images, repeated).value
  ]


def _write(
  config: ml_collections.ConfigDict,
  folder: epath.Path,
  number: int,
  image: int,
  sample: inference.Sample,
  world: worlds_base.World | None,
  target: worlds_base.Target | None,
):
  """Writes image `image` of prompt `number`, scored where there is a target."""
  images = np.stack([turn.image for turn in sample.turns])
  turns = []
  scores = _scores(world, target, images)
  for turn, score in zip(sample.turns, scores, strict=True):
    generated = gallery.GeneratedTurn(
      image="",
      score=score,
      text=turn.text,
      instruction=turn.instruction,
      stop=turn.stop,
      seconds=round(turn.seconds, 3),
    )
    turns.append(generated)
  generated_sample = gallery.GeneratedSample(
    prompt=sample.prompt,
    prompt_number=number,
    image_number=image,
    seed=config.eval.seed,
    model=config.model.folder,
    size=images.shape[1:3],
    turns=turns,
  )
  gallery.write(folder, generated_sample, list(images))


def _missing(folder: epath.Path, number: int, prompt: str) -> list[int]:
  """Returns the images of a prompt that are not there yet.

  Raises:
    ValueError: an image of this number is there, of another prompt.
  """
  missing = []
  for image in range(_NUM_IMAGES.value):
    sample = gallery.read_one(folder, number, image)
    if sample is None:
      missing.append(image)
    elif sample.prompt != prompt:
      raise ValueError(
        f"prompt {number} must be {sample.prompt!r} as in {folder}; it is {prompt!r}"
      )
  return missing


def draw(config: ml_collections.ConfigDict):
  """Draws what is missing in --out, and writes the page."""
  folder = epath.Path(_OUT.value)
  prompts = _read_prompts()
  base = model_setup.build(config)
  targets = _targets(config, base.world, prompts)
  for prompt in prompts:
    # Raises an error where the prompt does not fit.
    base.pretrained.tokenizer.segment(
      prompt.text, base.rollout.capacities.prompt
    )
  config_guard.check_writable(folder)
  facts = {
    "num_images": _NUM_IMAGES.value,
    "weights": base.pretrained.fingerprint(),
  }
  config_guard.write_or_check(folder, config.to_dict() | facts, _MAY_DIFFER)
  missing = [
    _missing(folder, number, prompt.text)
    for number, prompt in enumerate(prompts)
  ]
  title, model = f"R3: {len(prompts)} prompt{'s' * (len(prompts) > 1)}", None
  for number, prompt in enumerate(prompts):
    if not missing[number]:
      continue
    model = model or inference.load(
      config, on_step=Steps(config.eval.points - 1)
    )
    print(f"\n{prompt.text}")
    tell = lambda image, turn, text: print(
      f"  image {image + 1}, {f'round {turn + 1}' if turn else 'draft'}: {text}"
    )
    samples = model.generate(
      prompt.text,
      _NUM_IMAGES.value,
      config.eval.rounds,
      config.eval.seed,
      number,
      tell,
    )
    for image in missing[number]:
      _write(
        config,
        folder,
        number,
        image,
        samples[image],
        base.world,
        targets[number],
      )
    gallery.write_page(folder, title)
  print(f"\npage: {gallery.write_page(folder, title)}")


def _read_image() -> np.ndarray:
  """Returns --image on white.

  Raises:
    ValueError: it is no image.
  """
  try:
    with epath.Path(_IMAGE.value).open("rb") as file:
      image = PIL.Image.open(file).convert("RGBA")
  except OSError as error:
    raise ValueError(f"--image must be an image file: {error}") from error
  white = PIL.Image.new("RGBA", image.size, "white")
  return np.asarray(PIL.Image.alpha_composite(white, image).convert("RGB"))


def revise(config: ml_collections.ConfigDict):
  """Edits --image, or asks about it."""
  image = inference.fit(config, _read_image())
  if _QUESTION.value:
    print(inference.load(config).ask(image, _QUESTION.value, config.eval.seed))
    return
  folder = epath.Path(_OUT.value)
  if (folder / "edit.json").exists():
    raise ValueError(
      f"edits are never overwritten: choose another --out than {folder}"
    )
  config_guard.check_writable(folder)
  model = inference.load(config, on_step=Steps(config.eval.points - 1))
  edits = model.edit(
    image, _INSTRUCTION.value, _NUM_IMAGES.value, config.eval.seed
  )
  names = [f"edit_{i:02d}.png" for i in range(len(edits))]
  for name, edited in zip(names, edits):
    (folder / name).write_bytes(preprocess.png(edited))
    print(folder / name)
  facts = {
    "image": _IMAGE.value,
    "instruction": _INSTRUCTION.value,
    "seed": config.eval.seed,
    "model": config.model.folder,
    "size": list(image.shape[:2]),
    "edits": names,
  }
  (folder / "edit.json").write_text(json.dumps(facts, indent=1) + "\n")


def _check_flags():
  """Raises ValueError unless exactly one thing is asked for, with all that it needs."""
  asked = {
    name: flag.value
    for name, flag in {
      "prompt": _PROMPT,
      "prompts": _PROMPTS,
      "instruction": _INSTRUCTION,
      "question": _QUESTION,
    }.items()
  }
  given = [f"--{name}" for name, value in asked.items() if value]
  if len(given) != 1:
    raise ValueError(
      f"one of {', '.join('--' + name for name in asked)} must be given; got {given or 'none'}"
    )
  if bool(_IMAGE.value) != (given[0] in ("--instruction", "--question")):
    raise ValueError(
      "--instruction and --question need --image, and only they do"
    )
  if not _OUT.value and given[0] != "--question":
    raise ValueError("--out must name the folder to write")
  unused = {
    "--question": ("out", "num_images", "points", "rounds"),
    "--instruction": ("rounds",),
  }.get(given[0], ())
  useless = [f"--{name}" for name in unused if flags.FLAGS[name].present]
  if useless:
    raise ValueError(f"{given[0]} has no use for {', '.join(useless)}")


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  logging.set_verbosity(logging.WARNING)
  try:
    _check_flags()
    config = _config()
    (revise if _IMAGE.value else draw)(config)
  except ValueError as error:
    sys.exit(f"r3jax: {error}")


if __name__ == "__main__":
  app.run(main)

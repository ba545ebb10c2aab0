"""Draws the images of prompts into a folder, with scores where a world can verify them.

The folder gets a PNG file per round, a JSON file per image and index.html. Images that are there
already are not written again.
"""

from collections.abc import Callable, Sequence
import contextlib
import dataclasses

from etils import epath
import jax
import ml_collections
import numpy as np

from r3jax import inference
from r3jax.data import records
from r3jax.files import config_guard
from r3jax.files import ownership
from r3jax.report import gallery
from r3jax.worlds import base as worlds_base
from r3jax.worlds import registry

# Keys of the folder's config.json that do not change an image; the fingerprint `weights` stands for
# the model's folder.
_MAY_DIFFER = (
  "mesh",
  "num_images",
  "log",
  "checkpoint",
  "total_steps",
  "data",
  "model.folder",
)


@dataclasses.dataclass(frozen=True)
class Progress:
  """What is called while images are drawn.

  Attributes:
    on_prompt: with a prompt, before its images are drawn.
    on_text: with the number of the image, the number of the round and the text, see `inference`.
    while_drawing: makes a context in which the images of a prompt are drawn.
  """

  on_prompt: Callable[[str], None]
  on_text: inference.OnText
  while_drawing: Callable[[], contextlib.AbstractContextManager[None]]


@ownership.releasing()
def draw(
  config: ml_collections.ConfigDict,
  prompts: Sequence[records.Prompt],
  num_images: int,
  folder: epath.Path,
  progress: Progress,
  program_folder: epath.Path | None = None,
) -> epath.Path:
  """Draws the images of prompts that are missing in a folder; returns the path of its page.

  Args:
    config: as for `inference.load`; `eval.rounds` and `eval.seed` count too.
    prompts: what to draw, see `prompt_file.read`.
    num_images: number of images per prompt.
    folder: is made if it is not there.
    progress: called meanwhile.
    program_folder: see `inference.load`.

  Raises:
    ValueError: a prompt, the config or the folder cannot be used; nothing has been drawn.
  """
  base, _ = inference.prepare(config)
  targets = _targets(config, base.world, prompts)
  for prompt in prompts:
    # Raises an error where the prompt does not fit its segment.
    base.pretrained.tokenizer.segment(
      prompt.text, base.rollout.capacities.prompt
    )
  config_guard.check_writable(folder, "--out")
  ownership.claim(folder)
  constants = {
    "num_images": num_images,
    "weights": base.pretrained.fingerprint(),
  }
  config_guard.write_or_check(folder, config.to_dict() | constants, _MAY_DIFFER)
  missing = [
    _missing(folder, number, prompt.text, num_images)
    for number, prompt in enumerate(prompts)
  ]
  title = f"R3: {len(prompts)} prompt{'s' * (len(prompts) > 1)}"
  model = None
  for number, prompt in enumerate(prompts):
    if not missing[number]:
      continue
    if model is None:
      model = inference.load(config, program_folder=program_folder)
    progress.on_prompt(prompt.text)
    with progress.while_drawing():
      # All images of a prompt are drawn together, those that are there once more.
      samples = model.generate(
        prompt.text,
        num_images,
        config.eval.rounds,
        config.eval.seed,
        number,
        progress.on_text,
      )
    for image in missing[number]:
      scores = _scores(base.world, targets[number], samples[image])
      sample = _to_generated(config, number, image, samples[image], scores)
      images = [turn.image for turn in samples[image].turns]
      gallery.write(folder, sample, images)
    gallery.write_page(folder, title)
  return gallery.write_page(folder, title)


def _missing(
  folder: epath.Path, number: int, prompt: str, num_images: int
) -> list[int]:
  """Returns the numbers of a prompt's images that are missing in the folder.

  Raises:
    ValueError: an image of this prompt number shows another prompt.
  """
  missing = []
  for image in range(num_images):
    sample = gallery.read_one(folder, number, image)
    if sample is None:
      missing.append(image)
    elif sample.prompt != prompt:
      raise ValueError(
        f"prompt {number} must be {sample.prompt!r} as in {folder}; it is {prompt!r}"
      )
  return missing


def _targets(
  config: ml_collections.ConfigDict,
  world: worlds_base.World | None,
  prompts: Sequence[records.Prompt],
) -> list[worlds_base.Target | None]:
  """Returns the verifier's target of every prompt, None where it cannot be verified.

  A world verifies where it is the reward, the images have the size of its canvas, and it knows the
  prompt.

  Raises:
    ValueError: a prompt's `include` is not of this world.
  """
  size = (config.image.height, config.image.width)
  is_reward = config.reward.name == registry.OF_WORLD
  if world is None or world.canvas != size or not is_reward:
    return [None] * len(prompts)
  world_prompts = {}
  for prompt in (*world.records("train"), *world.records("heldout")):
    world_prompts[prompt.text] = prompt
  targets = []
  for prompt in prompts:
    if not prompt.include:
      prompt = world_prompts.get(prompt.text)
    targets.append(None if prompt is None else world.encode([prompt]))
  return targets


def _scores(
  world: worlds_base.World | None,
  target: worlds_base.Target | None,
  sample: inference.Sample,
) -> list[float | None]:
  """Returns the world's score of every round of a sample, None without a target."""
  num_turns = len(sample.turns)
  if world is None or target is None:
    return [None] * num_turns
  images = np.stack([turn.image for turn in sample.turns])
  targets = jax.tree.map(lambda x: np.repeat(x, num_turns, axis=0), target)
  scores = jax.jit(world.verify)(images, targets)
  return [float(value) for value in scores.value]


def _to_generated(
  config: ml_collections.ConfigDict,
  number: int,
  image: int,
  sample: inference.Sample,
  scores: Sequence[float | None],
) -> gallery.GeneratedSample:
  """Returns image `image` of prompt `number` as the gallery stores it."""
  turns = []
  for turn, score in zip(sample.turns, scores, strict=True):
    turns.append(
      gallery.GeneratedTurn(
        image="",  # named when it is written
        score=score,
        text=turn.text,
        instruction=turn.instruction,
        stop=turn.stop,
        seconds=round(turn.seconds, 3),
      )
    )
  return gallery.GeneratedSample(
    prompt=sample.prompt,
    prompt_number=number,
    image_number=image,
    seed=config.eval.seed,
    model=config.model.folder,
    size=sample.turns[0].image.shape[:2],
    turns=turns,
  )

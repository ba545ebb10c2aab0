"""Runs a model: the R3 loop for any prompt, image editing, visual question answering.

  import r3jax

  model = r3jax.load("shapes")
  (sample,) = model.generate("a photo of a red ring and a blue bow", seed=0)
  print(sample.turns[0].text, sample.turns[-1].image.shape)
  (image,) = model.edit(sample.turns[-1].image, "add a green heart at bottom-left", seed=0)
  print(model.ask(image, "how many hearts are there ?"))

Everything is deterministic for a seed. Images are uint8 arrays [height, width, 3] of the size that
the model was loaded for. Every image has its own random keys, those of evaluation, so that it does
not depend on the number of images that are drawn together.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
import numbers
import time
from typing import overload

from etils import epath
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from r3jax import types
from r3jax.agent import actors
from r3jax.agent import experience
from r3jax.agent import random_keys
from r3jax.agent import rollout
from r3jax.agent import rollout_settings
from r3jax.checkpoint import pretrained
from r3jax.files import config_files
from r3jax.model import preprocess
from r3jax.parallel import meshes
from r3jax.run import config_rules
from r3jax.run import model_setup
from r3jax.run import program_cache
from r3jax.run import stage_settings
from r3jax.sampling import decoding
from r3jax.sequence import protocol
from r3jax.sequence import thoughts
from r3jax.worlds import registry

# Take the place of the round's number in the random keys of edits and answers.
_EDIT = -1
_ASK = -2

# Called with the number of the image, the number of the round, and the text that was written.
OnText = Callable[[int, int, str], None]


@dataclasses.dataclass(frozen=True)
class Turn:
  """One round of a sample.

  Attributes:
    image: uint8 [height, width, 3] after the round.
    text: What the model wrote: its thought, and from the second round on its instruction.
    instruction: The edit that it asked for; empty for the draft.
    stop: Whether it asked for no further edit; the image is then that of the round before.
    seconds: Time of the round for all images that were drawn together, compilation included.
  """

  image: np.ndarray
  text: str
  instruction: str
  stop: bool
  seconds: float


@dataclasses.dataclass(frozen=True)
class Sample:
  """A draft and its revisions, up to the round in which the model asked for no further edit.

  Attributes:
    prompt: Text of the prompt.
    turns: One per round.
  """

  prompt: str
  turns: tuple[Turn, ...]


# --- Compiled stages ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Stages:
  """What the compiled stages depend on beside arrays.

  It holds no weights, because JAX keeps the static arguments of everything that it has compiled.

  Attributes:
    modules: Model, whose weights are placed by the sharding rules of rollouts.
    settings: How the stages sample.
  """

  modules: actors.Modules
  settings: rollout_settings.RolloutSettings

  def actor(self, policy: types.Params, frozen: types.Params) -> actors.Actor:
    """Returns the model with its weights."""
    return actors.Actor(self.modules, policy, frozen, self.settings)


_compiled = functools.partial(jax.jit, static_argnums=0)


@_compiled
def think(stages: Stages, policy, frozen, prompts, keys) -> rollout.Thought:
  """Writes a thought about every prompt."""
  return rollout.think(stages.actor(policy, frozen), prompts, keys)


@_compiled
def draft(stages: Stages, policy, frozen, thought, keys) -> types.Images:
  """Draws an image after every thought."""
  return rollout.draft(stages.actor(policy, frozen), thought, keys).images


@_compiled
def look(stages: Stages, policy, frozen, images) -> experience.Source:
  """Encodes images for `reflect` and `refine`."""
  return rollout.look(stages.actor(policy, frozen), images)


@_compiled
def reflect(
  stages: Stages, policy, frozen, prompts, source, keys
) -> experience.Text:
  """Answers the question of every prompt about its image."""
  return rollout.reflect(stages.actor(policy, frozen), prompts, source, keys)


@_compiled
def refine(
  stages: Stages, policy, frozen, source, instruction, keys
) -> types.Images:
  """Edits every image by its instruction."""
  actor = stages.actor(policy, frozen)
  return rollout.refine(actor, source, instruction, keys).images


# --- The model ---------------------------------------------------------------------------------


def _ignore_text(image: int, turn: int, text: str) -> None:
  del image, turn, text


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
  """A loaded model.

  Attributes:
    base: Folder, modules and sampling settings of the model.
    policy: Trained parameters.
    frozen: Parameters of ViT and autoencoder.
    mesh: Devices that the parameters are on.
    keep: Keeps traced stages between starts; None traces them anew.
  """

  base: model_setup.ModelSetup
  policy: types.Params
  frozen: types.Params
  mesh: jax.sharding.Mesh
  keep: program_cache.Keeper | None = None

  @property
  def size(self) -> tuple[int, int]:
    """Height and width of its images."""
    return self.base.modules.towers.size

  @overload
  def generate(
    self,
    prompt: str,
    num_images: int = 1,
    rounds: int = 4,
    seed: int = 0,
    number: int = 0,
    on_text: OnText = _ignore_text,
  ) -> list[Sample]: ...

  @overload
  def generate(
    self,
    prompt: Sequence[str],
    num_images: int = 1,
    rounds: int = 4,
    seed: int = 0,
    number: int = 0,
    on_text: OnText = _ignore_text,
  ) -> list[list[Sample]]: ...

  def generate(
    self,
    prompt: str | Sequence[str],
    num_images: int = 1,
    rounds: int = 4,
    seed: int = 0,
    number: int = 0,
    on_text: OnText = _ignore_text,
  ) -> list[Sample] | list[list[Sample]]:
    """Thinks about a prompt and drafts images, then reflects on them and edits them.

    Args:
      prompt: Text that the images should show, or several, which are drawn one after the other.
      num_images: Number of independent images of a prompt, which are drawn together.
      rounds: Maximum number of rounds, the draft included; at least 1.
      seed: Seed of all randomness.
      number: Number of the prompt among others of the same seed; another number draws other images.
        The prompts of a list have this number and the following ones.
      on_text: Called after every text; the number of the image begins anew with every prompt.

    Returns:
      One sample per image; for a list of prompts a list of these per prompt.

    Raises:
      TypeError: An argument has another type.
      ValueError: The prompt does not fit its segment, or has words that a word-level vocabulary
        lacks; `num_images` or `rounds` is too small.
    """
    for name, value in (
      ("num_images", num_images),
      ("rounds", rounds),
      ("seed", seed),
      ("number", number),
    ):
      _check_whole(name, value)
    if num_images < 1 or rounds < 1:
      raise ValueError(
        f"num_images and rounds must be at least 1; got {num_images} and {rounds}"
      )
    if isinstance(prompt, str):
      return self._generate(prompt, num_images, rounds, seed, number, on_text)
    if not isinstance(prompt, Sequence):
      raise TypeError(
        f"prompt must be a text or a list of texts; got {type(prompt).__name__}"
      )
    for text in prompt:
      _check_text("prompt", text)
    return [
      self._generate(text, num_images, rounds, seed, number + i, on_text)
      for i, text in enumerate(prompt)
    ]

  def _generate(
    self,
    prompt: str,
    num_images: int,
    rounds: int,
    seed: int,
    number: int,
    on_text: OnText,
  ) -> list[Sample]:
    """Returns the samples of one prompt, see `generate`."""
    question = protocol.reflection_question(prompt)
    prompts = self._prompts(prompt, question, num_images)
    turns: list[list[Turn]] = [[] for _ in range(num_images)]
    images = None
    stopped = np.zeros(num_images, bool)
    for turn in range(rounds):
      start = time.monotonic()
      keys = self._keys(seed, number, turn, num_images)
      open_rows = np.flatnonzero(~stopped)
      report = functools.partial(_report_texts, on_text, turn, open_rows)
      if turn == 0:
        texts, images = self._draft(prompts, keys, report)
        instructions = [""] * num_images
      else:
        texts, images, stopped = self._revise(
          images, stopped, prompts, keys, report
        )
        instructions = [thoughts.edit_instruction(text) for text in texts]
      seconds = time.monotonic() - start
      for i in open_rows:
        turns[i].append(
          Turn(
            image=images[i],
            text=texts[i],
            instruction=instructions[i],
            stop=bool(stopped[i]),
            seconds=seconds,
          )
        )
      if stopped.all():
        break
    return [Sample(prompt, tuple(chain)) for chain in turns]

  def edit(
    self,
    image: np.ndarray,
    instruction: str,
    num_images: int = 1,
    seed: int = 0,
  ) -> list[np.ndarray]:
    """Edits an image by an instruction.

    Args:
      image: uint8 [height, width, 3] of the model's size.
      instruction: Text of the edit.
      num_images: Number of independent edits, which are drawn together.
      seed: Seed of all randomness.

    Returns:
      The edited images.

    Raises:
      TypeError: An argument has another type.
      ValueError: The image has another size or dtype than the model's, or the instruction does not
        fit its segment.
    """
    self._check_image(image)
    _check_text("instruction", instruction)
    _check_whole("num_images", num_images)
    _check_whole("seed", seed)
    if num_images < 1:
      raise ValueError(f"num_images must be at least 1; got {num_images}")
    capacity = self.base.rollout.capacities.instruction
    ids, lengths = self.base.segments([instruction] * num_images, capacity)
    never_stop = np.zeros(num_images, bool)
    instructions = experience.Instruction(ids, lengths, never_stop)
    source = self._run(look, np.repeat(image[None], num_images, axis=0))
    keys = self._keys(seed, 0, _EDIT, num_images)
    edited = self._run(refine, source, instructions, keys)
    return list(np.asarray(edited))

  def ask(self, image: np.ndarray, question: str, seed: int = 0) -> str:
    """Answers a question about an image.

    Args:
      image: uint8 [height, width, 3] of the model's size.
      question: Text of the question.
      seed: Seed of all randomness.

    Returns:
      The answer, which begins with the model's thought in <think> tags.

    Raises:
      TypeError: An argument has another type.
      ValueError: The image has another size or dtype than the model's, or the question does not fit
        its segment.
    """
    self._check_image(image)
    _check_text("question", question)
    _check_whole("seed", seed)
    source = self._run(look, image[None])
    prompts = self._prompts("", question, 1)
    keys = self._keys(seed, 0, _ASK, 1)
    answer = self._run(reflect, prompts, source, keys)
    return self.base.decode(answer.ids, answer.lengths)[0]

  def _draft(
    self,
    prompts: experience.Prompts,
    keys: random_keys.Keys,
    report: Callable[[list[str]], None],
  ) -> tuple[list[str], np.ndarray]:
    """Returns the thoughts and the drafts; reports the thoughts before it draws."""
    text_keys, flow_keys = random_keys.split_keys(keys)
    thought = self._run(think, prompts, text_keys)
    texts = self.base.decode(thought.text.ids, thought.text.lengths)
    report(texts)
    images = self._run(draft, thought, flow_keys)
    return texts, np.asarray(images)

  def _revise(
    self,
    images: np.ndarray,
    stopped: np.ndarray,
    prompts: experience.Prompts,
    keys: random_keys.Keys,
    report: Callable[[list[str]], None],
  ) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Returns the reflections, the edited images, and which chains have stopped.

    Reports the reflections before it draws.
    """
    reflect_keys, refine_keys = random_keys.split_keys(keys)
    source = self._run(look, images)
    reflection = self._run(reflect, prompts, source, reflect_keys)
    texts = self.base.decode(reflection.ids, reflection.lengths)
    report(texts)
    parsed = thoughts.parse_strings(
      reflection.ids,
      reflection.lengths,
      "reflect",
      self.base.pretrained.tokenizer,
      self.base.rollout.capacities.instruction,
    )
    stopped = stopped | parsed.stop
    if not stopped.all():
      instructions = experience.Instruction(
        parsed.instruction, parsed.instruction_length, stopped
      )
      edited = self._run(refine, source, instructions, refine_keys)
      images = np.asarray(edited)
    return texts, images, stopped

  def _run(self, stage, *arguments):
    """Runs a compiled stage with the weights."""
    stages = Stages(self.base.modules, self.base.rollout)
    weights = (self.policy, self.frozen)
    with jax.set_mesh(self.mesh):
      if self.keep is None:
        return stage(stages, *weights, *arguments)
      program = self._kept(stage, stages, (*weights, *arguments))
      return program(*weights, *arguments)

  @functools.cached_property
  def _programs(self) -> dict[tuple[str, str], Callable]:
    """Stages that are kept between starts, by name and by what they were loaded for."""
    return {}

  def _kept(self, stage, stages: Stages, arguments: tuple) -> Callable:
    """Returns a stage as a program that an earlier start may have traced."""
    name = stage.__name__
    key = (name, str(jax.tree.map(jax.typeof, arguments)))
    if key not in self._programs:
      function = functools.partial(stage, stages)
      self._programs[key] = jax.jit(self.keep(name, function, arguments))
    return self._programs[key]

  def _keys(
    self, seed: int, number: int, turn: int, num_images: int
  ) -> random_keys.Keys:
    """Returns the keys of evaluation, which depend on prompt number, image and round."""
    ids = np.zeros((num_images, 3), np.int32)
    ids[:, 0] = number
    ids[:, 1] = np.arange(num_images)
    ids[:, 2] = turn
    return random_keys.evaluation_keys(seed, jnp.asarray(ids))

  def _prompts(
    self, prompt: str, question: str, num_rows: int
  ) -> experience.Prompts:
    """Returns rows of the same prompt and question, without a target."""
    capacities = self.base.rollout.capacities
    prompt_segments = self.base.segments([prompt] * num_rows, capacities.prompt)
    question_segments = self.base.segments(
      [question] * num_rows, capacities.question
    )
    return experience.Prompts(
      *prompt_segments, *question_segments, None, np.zeros(num_rows, np.int32)
    )

  def _check_image(self, image: np.ndarray) -> None:
    if not isinstance(image, np.ndarray | jax.Array):
      raise TypeError(
        f"an image must be an array, uint8 {[*self.size, 3]}; got {type(image).__name__} "
        "(numpy.asarray makes an array of a PIL image)"
      )
    if image.dtype != np.uint8 or image.shape != (*self.size, 3):
      raise ValueError(
        f"an image must be uint8 {[*self.size, 3]}; got {image.dtype} {list(image.shape)}"
      )


def _check_text(name: str, value: object) -> None:
  """Raises a TypeError where an argument is no text."""
  if not isinstance(value, str):
    raise TypeError(f"{name} must be a text; got {type(value).__name__}")


def _check_whole(name: str, value: object) -> None:
  """Raises a TypeError where an argument is no whole number."""
  if isinstance(value, bool) or not isinstance(value, numbers.Integral):
    raise TypeError(
      f"{name} must be a whole number; got {type(value).__name__}"
    )


def _report_texts(
  on_text: OnText, turn: int, rows: np.ndarray, texts: list[str]
) -> None:
  for i in rows:
    on_text(int(i), turn, texts[i])


# --- Loading -----------------------------------------------------------------------------------


def load(
  config: ml_collections.ConfigDict | str,
  mesh: jax.sharding.Mesh | None = None,
  program_folder: epath.Path | None = None,
) -> Model:
  """Loads the model of a config, with parameters in the dtype that it computes in.

  Args:
    config: Config as for training (`configs/r3_geneval.py`), or the name of one, or "shapes", the
      world whose small model is part of the package. Its model, image, sequence, text.top_p,
      text.top_k, shift and guidance of reason and refine, eval.points and eval.temperature are
      read.
    mesh: Mesh to shard the weights over. None shards them over all devices as config.mesh says, or,
      where that leaves data at -1, over tensor as far as the number of key/value heads allows, and
      then over fsdp.
    program_folder: Keeps traced stages between starts; None traces them anew. Its files are
      pickles: only its owner may have the right to write there.

  Raises:
    TypeError: The config is of another type.
    ValueError: The config or the model's folder cannot be used, or there are several processes.
  """
  config = _config_of(config)
  base, mesh = prepare(config, mesh)
  bagel = base.modules.bagel
  policy, frozen = base.pretrained.load(bagel, mesh, bagel.dtype)
  keep = None
  if program_folder:
    constants = program_cache.constants(
      config.to_dict(), base.pretrained.folder, program_cache.NOT_GENERATED
    )
    keep = program_cache.Keeper(program_folder, "generation", constants)
  return Model(base, policy, frozen, mesh, keep)


def _config_of(
  config: ml_collections.ConfigDict | str,
) -> ml_collections.ConfigDict:
  """Returns a config itself, or that of a name.

  Raises:
    TypeError: It is neither.
    ValueError: There is no config of that name.
  """
  if isinstance(config, str):
    if config in registry.REGISTERED:
      config = f"r3_geneval:{config}"
    return config_files.load(config)
  if not isinstance(config, ml_collections.ConfigDict):
    raise TypeError(
      "config must be a ConfigDict, as r3jax.get_config returns it, or its name; "
      f"got {type(config).__name__}"
    )
  return config


def prepare(
  config: ml_collections.ConfigDict,
  mesh: jax.sharding.Mesh | None = None,
) -> tuple[model_setup.ModelSetup, jax.sharding.Mesh]:
  """Checks everything that `load` checks before it reads weights, which takes minutes.

  Args:
    config: See `load`.
    mesh: See `load`.

  Returns:
    The model without its weights, as it samples at inference, and the mesh of the weights.

  Raises:
    ValueError: The config or the model's folder cannot be used, or there are several processes.
  """
  if jax.process_count() > 1:
    raise ValueError(
      f"inference runs in one process; there are {jax.process_count()}"
    )
  config_rules.check(config)
  base = model_setup.build(config)
  stages = make_stages(config, base.modules, base.rollout)
  if mesh is None:
    mesh = _make_mesh(config, base.pretrained.sizes.llm.num_kv_heads)
  base = dataclasses.replace(
    base, modules=stages.modules, rollout=stages.settings
  )
  return base, mesh


def make_stages(
  config: ml_collections.ConfigDict,
  modules: actors.Modules,
  settings: rollout_settings.RolloutSettings,
) -> Stages:
  """Returns the stages at inference: they sample as evaluation does, and are not mapped.

  Args:
    config: See `load`.
    modules: Model of the config, with the sharding rules of training.
    settings: How the config samples in training.
  """
  settings = stage_settings.for_evaluation(config, settings)

  def unmapped(text: decoding.TextSampling) -> decoding.TextSampling:
    return dataclasses.replace(text, axis=None)

  settings = dataclasses.replace(
    settings,
    reason_text=unmapped(settings.reason_text),
    reflect_text=unmapped(settings.reflect_text),
  )
  bagel = modules.bagel.clone(rules=modules.rollout_rules)
  return Stages(dataclasses.replace(modules, bagel=bagel), settings)


def _make_mesh(
  config: ml_collections.ConfigDict, num_kv_heads: int
) -> jax.sharding.Mesh:
  if config.mesh.data != -1:
    return meshes.make_mesh(**config.mesh)
  tensor = math.gcd(jax.device_count(), num_kv_heads)
  fsdp = jax.device_count() // tensor
  return meshes.make_mesh(data=1, fsdp=fsdp, tensor=tensor)


def fit(config: ml_collections.ConfigDict, image: np.ndarray) -> np.ndarray:
  """Resizes an image to the nearest size that a model accepts, and sets `config.image` to it.

  Args:
    config: Config as for `load`.
    image: uint8 [height, width, 3] of any size.

  Returns:
    uint8 [config.image.height, config.image.width, 3].

  Raises:
    ValueError: The model's folder cannot be read.
  """
  model = pretrained.find(config.model.folder, config.world)
  height, width = preprocess.target_size(
    *image.shape[:2], model.sizes.autoencoder_transform
  )
  config.image.update(height=height, width=width)
  resized = preprocess.resize(image[None], (height, width))
  return np.asarray(resized)[0]

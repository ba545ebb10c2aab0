"""A model at work: the R3 loop for any prompt, image editing, visual question answering.

  from configs import r3_geneval
  from r3jax import inference

  model = inference.load(r3_geneval.get_config("shapes"))
  (sample,) = model.generate("a photo of a red ring and a blue bow", seed=0)
  print(sample.turns[0].text, sample.turns[-1].image.shape)
  (image,) = model.edit(sample.turns[-1].image, "add a green heart at bottom-left", seed=0)
  print(model.ask(image, "how many hearts are there ?"))

Everything is deterministic for a seed. Images are uint8 arrays [height, width, 3], of the size that
the model was loaded for. Every image has noise and randomness of its own, those of evaluation, so
that it does not depend on how many are drawn together.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
import time

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
from r3jax.model import preprocess
from r3jax.parallel import meshes
from r3jax.run import setup
from r3jax.sequence import protocol
from r3jax.sequence import thoughts

# in place of the round's number, in the randomness of edits and answers
_EDIT, _ASK = -1, -2


@dataclasses.dataclass(frozen=True)
class Turn:
  """One round of a sample.

  Attributes:
    image: uint8 [height, width, 3] after the round.
    text: what the model wrote: its thought, and from the second round on its instruction.
    instruction: the edit it asked for; empty for the draft.
    stop: whether it asked for none, so that the image is that of the round before.
    seconds: of the round, compilation included, for all images that were drawn together.
  """

  image: np.ndarray
  text: str
  instruction: str
  stop: bool
  seconds: float


@dataclasses.dataclass(frozen=True)
class Sample:
  """A draft and its revisions, up to the round in which the model asked for no further edit."""

  prompt: str
  turns: tuple[Turn, ...]


# on_text(number of the image, number of the round, text): a text has been written
OnText = Callable[[int, int, str], None]


@dataclasses.dataclass(frozen=True)
class Stages:
  """What the stages compute with beside arrays; holds no weights, for JAX keeps what it compiled for.

  Attributes:
    modules: the model; its weights are where the rules of rollouts put them.
    settings: how to sample.
  """

  modules: actors.Modules
  settings: rollout_settings.RolloutSettings

  def actor(self, policy: types.Params, frozen: types.Params) -> actors.Actor:
    """Returns the model at work."""
    return actors.Actor(self.modules, policy, frozen, self.settings)


_compiled = functools.partial(jax.jit, static_argnums=0)


@_compiled
def think(stages: Stages, policy, frozen, prompts, keys) -> rollout.Thought:
  """Thinks about every prompt."""
  return rollout.think(stages.actor(policy, frozen), prompts, keys)


@_compiled
def draft(stages: Stages, policy, frozen, thought, keys) -> types.Images:
  """Draws an image of every thought."""
  return rollout.draft(stages.actor(policy, frozen), thought, keys).images


@_compiled
def look(stages: Stages, policy, frozen, images) -> experience.Source:
  """Prepares images for what follows."""
  return rollout.look(stages.actor(policy, frozen), images)


@_compiled
def reflect(
  stages: Stages, policy, frozen, prompts, source, keys
) -> experience.Text:
  """Answers the questions about every image."""
  return rollout.reflect(stages.actor(policy, frozen), prompts, source, keys)


@_compiled
def refine(stages: Stages, policy, frozen, source, told, keys) -> types.Images:
  """Edits every image as told."""
  return rollout.refine(stages.actor(policy, frozen), source, told, keys).images


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
  """A loaded model.

  Attributes:
    base: its folder, modules and settings of sampling.
    policy, frozen: its weights.
    mesh: that they are on.
  """

  base: setup.Base
  policy: types.Params
  frozen: types.Params
  mesh: jax.sharding.Mesh

  @property
  def size(self) -> tuple[int, int]:
    """Height and width of its images."""
    return self.base.modules.towers.size

  def generate(
    self,
    prompt: str,
    num_images: int = 1,
    rounds: int = 4,
    seed: int = 0,
    number: int = 0,
    on_text: OnText = lambda image, turn, text: None,
  ) -> list[Sample]:
    """Thinks about a prompt, drafts images, then looks at them and edits them.

    Args:
      prompt: what the images should show.
      num_images: independent images, drawn together.
      rounds: at most, the draft included; at least 1.
      seed: of all randomness.
      number: of the prompt among others of the same seed; another number draws other images.
      on_text: called after every text.

    Returns:
      One sample per image.

    Raises:
      ValueError: the prompt does not fit its segment, or holds words that a word-level vocabulary
        lacks; a number is too small.
    """
    if num_images < 1 or rounds < 1:
      raise ValueError(
        f"num_images and rounds must be at least 1; got {num_images} and {rounds}"
      )
    prompts = self._prompts(
      prompt, protocol.reflection_question(prompt), num_images
    )
    turns: list[list[Turn]] = [[] for _ in range(num_images)]
    images, stop = None, np.zeros(num_images, bool)
    for turn in range(rounds):
      start = time.monotonic()
      keys = self._keys(seed, number, turn, num_images)
      make = (
        self._draft
        if turn == 0
        else functools.partial(self._revise, images, stop)
      )
      texts, images, stop, open_rows = make(
        prompts, keys, functools.partial(_tell, on_text, turn)
      )
      seconds = time.monotonic() - start
      for i in open_rows:
        instruction = thoughts.edit_instruction(texts[i]) if turn else ""
        turns[i].append(
          Turn(images[i], texts[i], instruction, bool(stop[i]), seconds)
        )
      if stop.all():
        break
    return [Sample(prompt, tuple(made)) for made in turns]

  def edit(
    self,
    image: np.ndarray,
    instruction: str,
    num_images: int = 1,
    seed: int = 0,
  ) -> list[np.ndarray]:
    """Edits an image as told, `num_images` times.

    Raises:
      ValueError: the image has another size or dtype than the model's, or the instruction does not
        fit its segment.
    """
    self._check(image, num_images)
    capacity = self.base.rollout.capacities.instruction
    segments = self.base.segments([instruction] * num_images, capacity)
    source = self._run(look, np.repeat(image[None], num_images, axis=0))
    told = experience.Instruction(*segments, np.zeros(num_images, bool))
    return list(
      np.asarray(
        self._run(refine, source, told, self._keys(seed, 0, _EDIT, num_images))
      )
    )

  def ask(self, image: np.ndarray, question: str, seed: int = 0) -> str:
    """Answers a question about an image; the answer begins with the model's thought in <think> tags.

    Raises:
      ValueError: the image has another size or dtype than the model's, or the question does not fit
        its segment.
    """
    self._check(image, 1)
    source = self._run(look, image[None])
    text = self._run(
      reflect,
      self._prompts("", question, 1),
      source,
      self._keys(seed, 0, _ASK, 1),
    )
    return self._decode(text)[0]

  # --- Stages ------------------------------------------------------------------------------------

  def _draft(self, prompts: experience.Prompts, keys: random_keys.Keys, tell):
    text_keys, flow_keys = random_keys.split_keys(keys)
    thought = self._run(think, prompts, text_keys)
    texts, rows = self._decode(thought.text), range(prompts.ids.shape[0])
    tell(rows, texts)
    return (
      texts,
      np.asarray(self._run(draft, thought, flow_keys)),
      np.zeros(len(rows), bool),
      rows,
    )

  def _revise(
    self,
    images,
    stopped: np.ndarray,
    prompts: experience.Prompts,
    keys: random_keys.Keys,
    tell,
  ):
    reflect_keys, refine_keys = random_keys.split_keys(keys)
    source = self._run(look, images)
    text = self._run(reflect, prompts, source, reflect_keys)
    texts, rows = self._decode(text), np.flatnonzero(~stopped)
    tell(rows, texts)
    parsed = self._parse(text)
    stop = stopped | parsed.stop
    if not stop.all():
      told = experience.Instruction(
        parsed.instruction, parsed.instruction_length, stop
      )
      images = np.asarray(self._run(refine, source, told, refine_keys))
    return texts, images, stop, rows

  def _run(self, stage, *arguments):
    """Runs a compiled stage with the weights."""
    stages = Stages(self.base.modules, self.base.rollout)
    with jax.set_mesh(self.mesh):
      return stage(stages, self.policy, self.frozen, *arguments)

  # --- In and out --------------------------------------------------------------------------------

  def _keys(
    self, seed: int, number: int, turn: int, num_images: int
  ) -> random_keys.Keys:
    """Returns the keys of evaluation: the same prompt number, image and round draw the same."""
    ids = np.stack(
      [
        np.full(num_images, number),
        np.arange(num_images),
        np.full(num_images, turn),
      ],
      axis=1,
    )
    return random_keys.numbered_keys(seed, jnp.asarray(ids, jnp.int32))

  def _prompts(
    self, prompt: str, question: str, rows: int
  ) -> experience.Prompts:
    c = self.base.rollout.capacities
    asked = (
      *self.base.segments([prompt] * rows, c.prompt),
      *self.base.segments([question] * rows, c.question),
    )
    return experience.Prompts(*asked, None, np.zeros(rows, np.int32))

  def _parse(self, text: experience.Text) -> thoughts.Parsed:
    tokenizer, capacity = (
      self.base.pretrained.tokenizer,
      self.base.rollout.capacities.instruction,
    )
    return thoughts.parse_strings(
      text.ids, text.lengths, "reflect", tokenizer, capacity
    )

  def _decode(self, text: experience.Text) -> list[str]:
    ids, lengths = np.asarray(text.ids), np.asarray(text.lengths)
    return [
      self.base.pretrained.tokenizer.decode(row[1 : n - 1].tolist())
      for row, n in zip(ids, lengths)
    ]

  def _check(self, image: np.ndarray, num_images: int):
    if image.dtype != np.uint8 or image.shape != (*self.size, 3):
      raise ValueError(
        f"an image must be uint8 {[*self.size, 3]}; got {image.dtype} {list(image.shape)}"
      )
    if num_images < 1:
      raise ValueError(f"num_images must be at least 1; got {num_images}")


def _tell(on_text: OnText, turn: int, rows, texts: list[str]):
  for i in rows:
    on_text(int(i), turn, texts[i])


def load(
  config: ml_collections.ConfigDict,
  mesh: jax.sharding.Mesh | None = None,
  on_step: Callable[[np.ndarray], None] | None = None,
) -> Model:
  """Loads the model of a config, with parameters in the dtype that it computes in.

  Args:
    config: as for the main job (`configs/r3_geneval.py`): model, image, sequence, text.top_p and
      text.top_k, shift and guidance of reason and refine, eval.points and eval.temperature are used.
    mesh: that the weights are sharded over; None shards them over all devices as config.mesh says,
      or, where that leaves data at -1, over tensor as far as the key/value heads go and then fsdp.
    on_step: called on the host with the number of every step of sampling an image.

  Raises:
    ValueError: the config or the model's folder cannot be used, or there are several processes.
  """
  if jax.process_count() > 1:
    raise ValueError(
      f"inference runs in one process; there are {jax.process_count()}"
    )
  base = setup.build_base(config)
  made = make_stages(config, base.modules, base.rollout, on_step)
  mesh = mesh or _mesh(config, base.pretrained.sizes.llm.num_kv_heads)
  bagel = made.modules.bagel
  policy, frozen = base.pretrained.load(bagel, mesh, bagel.dtype)
  base = dataclasses.replace(base, modules=made.modules, rollout=made.settings)
  return Model(base, policy, frozen, mesh)


def make_stages(
  config: ml_collections.ConfigDict,
  modules: actors.Modules,
  settings: rollout_settings.RolloutSettings,
  on_step: Callable[[np.ndarray], None] | None = None,
) -> Stages:
  """Returns the stages of a config at inference: sampling as in evaluation, rules of rollouts, nothing mapped.

  Args:
    config: see `load`.
    modules, settings: of the config, see `experiment.Base`.
    on_step: see `load`.
  """
  settings = setup.evaluation_settings(config, settings)
  flow = lambda stage: dataclasses.replace(stage, on_step=on_step)
  text = lambda stage: dataclasses.replace(stage, axis=None)
  settings = dataclasses.replace(
    settings,
    reason_text=text(settings.reason_text),
    reflect_text=text(settings.reflect_text),
    reason_flow=flow(settings.reason_flow),
    refine_flow=flow(settings.refine_flow),
  )
  bagel = modules.bagel.clone(rules=modules.rollout_rules)
  return Stages(dataclasses.replace(modules, bagel=bagel), settings)


def _mesh(config: ml_collections.ConfigDict, heads: int) -> jax.sharding.Mesh:
  if config.mesh.data != -1:
    return meshes.make_mesh(**config.mesh)
  tensor = math.gcd(jax.device_count(), heads)
  return meshes.make_mesh(
    data=1, fsdp=jax.device_count() // tensor, tensor=tensor
  )


def fit(config: ml_collections.ConfigDict, image: np.ndarray) -> np.ndarray:
  """Resizes an image to the nearest size that the config's model takes, and sets `config.image` to it.

  Args:
    config: as for `load`.
    image: uint8 [height, width, 3] of any size.

  Raises:
    ValueError: the model's folder cannot be read.
  """
  size = preprocess.target_size(
    *image.shape[:2],
    pretrained.find(
      config.model.folder, config.world
    ).sizes.autoencoder_transform,
  )
  config.image.update(height=size[0], width=size[1])
  return np.asarray(preprocess.resize(image[None], size))[0]

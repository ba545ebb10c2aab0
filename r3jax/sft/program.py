"""The supervised training of the small BAGEL, from a config to a folder in BAGEL's format.

Stages: autoencoder, ViT, texts alone, then texts and images together. The ViT learns to tell what
every cell holds, as SigLIP comes pretrained to BAGEL.
"""

from collections.abc import Callable
import dataclasses
import math
import pathlib

from absl import logging
from etils import epath
import flax.linen as nn
import jax
import ml_collections

from r3jax import types
from r3jax.agent import actors
from r3jax.checkpoint import bagel_config
from r3jax.checkpoint import bagel_files
from r3jax.checkpoint import pretrained
from r3jax.checkpoint import tokenizer_files
from r3jax.files import config_guard
from r3jax.files import ownership
from r3jax.files import paths
from r3jax.model import architecture
from r3jax.model import image_encoders
from r3jax.model import network
from r3jax.model import parameters
from r3jax.parallel import meshes
from r3jax.run import machine
from r3jax.sequence import tokenization
from r3jax.sft import card
from r3jax.sft import config_rules
from r3jax.sft import curves
from r3jax.sft import fitting
from r3jax.sft import joint
from r3jax.sft import small_bagel
from r3jax.sft import stages
from r3jax.sft import towers
from r3jax.worlds.shapes import batches
from r3jax.worlds.shapes import prompts
from r3jax.worlds.shapes import scenes
from r3jax.worlds.shapes import vocabulary

# Keys of the config that do not change what is learned; a resumed run may have others.
MAY_DIFFER = ("log_every", "save_every", "stored_dtype")
# Folder of what a resumed run goes on with, and of curves and answers.
_FOLDER = "training"


@dataclasses.dataclass(frozen=True)
class Model:
  """A model in training.

  Attributes:
    weights: {"policy", "vision", "autoencoder"} parameters.
    sizes: its sizes.
  """

  weights: types.Params
  sizes: architecture.BagelConfig


def use_all_cores(config: ml_collections.ConfigDict) -> None:
  """Makes as many CPU devices as batches split over; must come before JAX's first computation."""
  sections = (*config_rules.STAGES, "exam")
  batch_sizes = [config[name].batch_size for name in sections]
  meshes.use_all_cores(math.gcd(*batch_sizes))


def load_start(start: str) -> Model:
  """Loads a model to go on with.

  Args:
    start: its folder.

  Raises:
    ValueError: the folder holds no such model, or one of another vocabulary.
  """
  folder = paths.of_user(start)
  sizes = bagel_config.load(folder)
  words = vocabulary.build_tokenizer().get_vocab()
  if tokenizer_files.load(folder).vocabulary != words:
    raise ValueError(
      f"the vocabulary of config.start must be this world's; it differs: {folder}"
    )
  return Model(bagel_files.load(folder, sizes), sizes)


@ownership.releasing()
def run(
  config: ml_collections.ConfigDict, out: pathlib.Path, start: Model | None
) -> None:
  """Trains a model and writes it, now and then and at the end, with a card.

  A run that was interrupted goes on where its stages were last saved.

  Args:
    config: see `configs/sft_shapes.py`.
    out: folder to write, in BAGEL's format.
    start: model whose policy is trained further; None trains everything from nothing.

  Raises:
    ValueError: a value of the config breaks its rule, another process writes there, or the folder
      holds a run with another config; nothing has been written.
  """
  config_rules.check(config)
  words = vocabulary.build_tokenizer()
  ownership.claim(out)
  folder = out / _FOLDER
  config_guard.check(folder, config.to_dict(), MAY_DIFFER)
  folder.mkdir(parents=True, exist_ok=True)
  config_guard.write_or_check(folder, config.to_dict(), MAY_DIFFER)
  words.save(str(out / "tokenizer.json"))
  model = start or _train_towers(config, folder)
  sizes = model.sizes

  def save(weights: types.Params) -> None:
    bagel_files.save(weights, sizes, out, config.stored_dtype)
    pretrained.write_digests(out)
    logging.info("wrote %s", out)

  if not stages.record(folder, "text").step:
    save(model.weights)  # the towers are done, and the policy has not begun
  _train_policy(config, model, tokenization.TextTokenizer(words), folder, save)
  records = {name: stages.record(folder, name) for name in config_rules.STAGES}
  card.write(out / "README.md", config, records, machine.start())


def _schedule(section: ml_collections.ConfigDict) -> fitting.Schedule:
  return fitting.Schedule(
    num_steps=section.num_steps,
    batch_size=section.batch_size,
    learning_rate=section.learning_rate,
    warmup=section.warmup,
  )


def _train_towers(
  config: ml_collections.ConfigDict, folder: pathlib.Path
) -> Model:
  """Trains autoencoder and ViT from nothing; returns them with a fresh policy."""
  watchers = stages.Watchers(config.log_every, config.save_every)

  def stage(name: str) -> stages.Stage:
    return stages.Stage(folder, name, _schedule(config[name]), watchers)

  autoencoder, sizes = towers.train_autoencoder(
    small_bagel.sizes(config.model),
    stage("autoencoder"),
    config.autoencoder.kl_weight,
    config.seed,
  )
  vision = towers.train_vision(sizes, stage("vision"), config.seed)

  @jax.jit
  def fresh_policy() -> types.Params:
    key = jax.random.key(config.seed)
    return nn.unbox(parameters.init(network.Bagel(sizes), key))

  weights = {
    "autoencoder": autoencoder,
    "vision": vision,
    "policy": fresh_policy(),
  }
  return Model(weights, sizes)


def _train_policy(
  config: ml_collections.ConfigDict,
  model: Model,
  tokenizer: tokenization.TextTokenizer,
  folder: pathlib.Path,
  save: Callable[[types.Params], None],
) -> None:
  """Trains the policy on texts alone, then on texts and images; calls `save` with all weights."""
  encoders = image_encoders.Towers(model.sizes, (scenes.CANVAS, scenes.CANVAS))
  modules = actors.Modules(network.Bagel(model.sizes), encoders)
  settings = small_bagel.settings(tokenizer, encoders, config.exam.points)
  frozen = {name: model.weights[name] for name in ("autoencoder", "vision")}
  training = joint.JointTraining(
    modules,
    settings,
    frozen,
    config.joint.copies,
    config.joint.flow_weight,
    small_bagel.SHIFT,
  )
  exam = curves.exam(modules, settings, tokenizer, _exam_settings(config.exam))

  def measure_texts(step: int, policy: types.Params) -> curves.Scores:
    return exam.texts(policy, frozen, epath.Path(folder) / "text", step)

  def measure_all(step: int, policy: types.Params) -> curves.Scores:
    texts = exam.texts(policy, frozen, epath.Path(folder) / "joint", step)
    return texts | exam.images(policy, frozen)

  watchers = stages.Watchers(
    config.log_every,
    config.save_every,
    config.exam.every,
    measure_texts,
    save=lambda policy: save(frozen | {"policy": policy}),
  )
  # The window is about images, too.
  watchers_of_both = dataclasses.replace(
    watchers,
    measure=measure_all,
    is_enough=curves.Window(**config.window).holds,
  )
  encoder = batches.Encoder(
    prompts.by_tag(prompts.train_records()),
    tokenizer,
    settings.capacities,
    batches.Mix(**config.mix),
    seed=2 * config.seed,
  )
  policy = stages.Stage(folder, "text", _schedule(config.text), watchers).fit(
    training.text_loss, model.weights["policy"], encoder, encoder.seed
  )
  # Other examples than those of texts alone.
  encoder = dataclasses.replace(encoder, seed=2 * config.seed + 1)
  stage = stages.Stage(
    folder, "joint", _schedule(config.joint), watchers_of_both
  )
  policy = stage.fit(training.loss, policy, encoder, encoder.seed)
  save(frozen | {"policy": policy})


def _exam_settings(section: ml_collections.ConfigDict) -> curves.Settings:
  return curves.Settings(
    prompts=section.prompts,
    images=section.images,
    batch_size=section.batch_size,
    seed=section.seed,
  )

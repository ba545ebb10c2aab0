"""The supervised training of the small BAGEL, from a config to a folder in BAGEL's format.

Stages: autoencoder, ViT, texts alone, then texts and images together. The ViT learns to tell what
every cell holds, as SigLIP comes pretrained to BAGEL.
"""

from collections.abc import Callable
import dataclasses
import math
import pathlib

from absl import logging
import flax.linen as nn
import jax
import ml_collections

from r3jax import types
from r3jax.agent import actors
from r3jax.checkpoint import bagel_config
from r3jax.checkpoint import bagel_files
from r3jax.checkpoint import pretrained
from r3jax.checkpoint import tokenizer_files
from r3jax.files import ownership
from r3jax.files import paths
from r3jax.model import architecture
from r3jax.model import image_encoders
from r3jax.model import network
from r3jax.model import parameters
from r3jax.parallel import meshes
from r3jax.sequence import tokenization
from r3jax.sft import config_rules
from r3jax.sft import fitting
from r3jax.sft import joint
from r3jax.sft import small_bagel
from r3jax.sft import towers
from r3jax.worlds.shapes import batches
from r3jax.worlds.shapes import prompts
from r3jax.worlds.shapes import scenes
from r3jax.worlds.shapes import vocabulary

# Shift of the times of flow matching: that of the sampling schedule in `configs/r3_geneval.py`.
_TIME_SHIFT = 3.0


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
  batch_sizes = [config[name].batch_size for name in config_rules.STAGES]
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
  """Trains a model and writes it, now and then and at the end.

  Args:
    config: see `configs/sft_shapes.py`.
    out: folder to write, in BAGEL's format.
    start: model whose policy is trained further; None trains everything from nothing.

  Raises:
    ValueError: a value of the config breaks its rule, or another process writes there; nothing has
      been written.
  """
  config_rules.check(config)
  words = vocabulary.build_tokenizer()
  ownership.claim(out)
  words.save(str(out / "tokenizer.json"))
  model = start or _train_towers(config)
  sizes = model.sizes

  def save(weights: types.Params) -> None:
    bagel_files.save(weights, sizes, out, config.stored_dtype)
    pretrained.write_digests(out)
    logging.info("wrote %s", out)

  save(model.weights)  # the towers are done
  _train_policy(config, model, tokenization.TextTokenizer(words), save)


def _stage(section: ml_collections.ConfigDict) -> fitting.Stage:
  return fitting.Stage(
    num_steps=section.num_steps,
    batch_size=section.batch_size,
    learning_rate=section.learning_rate,
    warmup=section.warmup,
  )


def _train_towers(config: ml_collections.ConfigDict) -> Model:
  """Trains autoencoder and ViT from nothing; returns them with a fresh policy."""
  watch = fitting.log_every(config.log_every)
  autoencoder, sizes = towers.train_autoencoder(
    small_bagel.sizes(config.model),
    _stage(config.autoencoder),
    config.autoencoder.kl_weight,
    config.seed,
    watch,
  )
  vision = towers.train_vision(sizes, _stage(config.vision), config.seed, watch)

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
  save: Callable[[types.Params], None],
) -> None:
  """Trains the policy on texts alone, then on texts and images; calls `save` with all weights."""
  encoders = image_encoders.Towers(model.sizes, (scenes.CANVAS, scenes.CANVAS))
  settings = small_bagel.sft_settings(tokenizer, encoders)
  frozen = {name: model.weights[name] for name in ("autoencoder", "vision")}
  training = joint.JointTraining(
    actors.Modules(network.Bagel(model.sizes), encoders),
    settings,
    frozen,
    config.joint.copies,
    config.joint.flow_weight,
    _TIME_SHIFT,
  )
  records_by_tag = prompts.by_tag(prompts.train_records())
  mix = batches.Mix(**config.mix)
  log = fitting.log_every(config.log_every)
  policy = model.weights["policy"]
  stages = (
    (training.text_loss, _stage(config.text)),
    (training.loss, _stage(config.joint)),
  )
  for number, (loss, stage) in enumerate(stages):
    seed = 2 * config.seed + number
    encoder = batches.Encoder(
      records_by_tag, tokenizer, settings.capacities, mix, seed
    )
    examples = batches.iterate(encoder, stage.batch_size, stage.num_steps)

    def watch(step, policy, metrics, num_steps=stage.num_steps):
      log(step, policy, metrics)
      if step % config.save_every == 0 or step == num_steps:
        save(frozen | {"policy": policy})

    policy = fitting.fit(loss, policy, stage.optimizer(), examples, seed, watch)

"""Trains a small BAGEL on the embedded world: autoencoder, ViT, texts, then texts and flow together.

  python launch/sft.py --config=configs/sft_shapes.py --out=DIR

Writes a folder in BAGEL's format. It starts from nothing unless `config.start` names such a folder.
"""

import dataclasses
import functools
import math
import pathlib
import sys

from absl import app
from absl import flags
from absl import logging
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
from ml_collections import config_flags
import numpy as np

from r3jax.agent import actors
from r3jax.checkpoint import bagel_config
from r3jax.checkpoint import bagel_files
from r3jax.checkpoint import tokenizer_files
from r3jax.model import architecture
from r3jax.model import autoencoder as autoencoder_lib
from r3jax.model import image_encoders
from r3jax.model import network
from r3jax.model import parameters
from r3jax.model import preprocess
from r3jax.model import siglip
from r3jax.parallel import meshes
from r3jax.sequence import tokenization
from r3jax.sft import small_bagel
from r3jax.sft import train
from r3jax.worlds.shapes import batches
from r3jax.worlds.shapes import prompts
from r3jax.worlds.shapes import scenes as scenes_lib
from r3jax.worlds.shapes import vocabulary

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Config file.", lock_config=True
)
_OUT = flags.DEFINE_string("out", None, "Folder to write, in BAGEL's format.")


def log(every: int, step: int, unused_params, metrics: dict):
  """Logs the metrics of every so many steps."""
  if step % every == 0:
    logging.info(
      "step %d: %s",
      step,
      ", ".join(f"{name} {float(x):.4f}" for name, x in metrics.items()),
    )


def train_autoencoder(
  config: ml_collections.ConfigDict, sizes: architecture.BagelConfig
):
  """Returns trained autoencoder parameters and the sizes with the measured latent scale and shift."""
  model = autoencoder_lib.Autoencoder(sizes.autoencoder)
  blank = jnp.zeros((1, scenes_lib.CANVAS, scenes_lib.CANVAS, 3))
  params = nn.unbox(jax.jit(model.init)(jax.random.key(config.seed), blank))[
    "params"
  ]
  settings = config.autoencoder
  scenes = functools.partial(batches.dense_scene, seed=config.seed)
  data = batches.iterate(scenes, settings.batch_size, settings.num_steps)

  def loss(params, scene, key):
    return train.autoencoder_loss(
      model, params, scenes_lib.render(scene), settings.kl_weight, key
    )

  optimizer = train.adamw(
    settings.learning_rate, settings.num_steps, settings.warmup
  )
  params = train.fit(
    loss,
    params,
    optimizer,
    data,
    config.seed,
    functools.partial(log, config.log_every),
  )
  scene = next(
    batches.iterate(
      functools.partial(batches.dense_scene, seed=config.seed + 1), 256, 1
    )
  )
  moments = model.apply(
    {"params": params},
    preprocess.to_pixels(scenes_lib.render(scene)),
    method="moments",
  )
  mean = np.asarray(jnp.split(moments, 2, axis=-1)[0], np.float64)
  measured = dataclasses.replace(
    sizes.autoencoder,
    scale=round(float(1 / mean.std()), 4),
    shift=round(float(mean.mean()), 4),
  )
  return params, dataclasses.replace(sizes, autoencoder=measured)


def train_vision(
  config: ml_collections.ConfigDict, sizes: architecture.BagelConfig
):
  """Returns trained ViT parameters."""
  vision, settings = sizes.vision, config.vision
  tower = siglip.VisionTransformer(vision)
  patches = jnp.zeros((1, 1, 3 * vision.patch_size**2))
  params = nn.unbox(
    jax.jit(tower.init)(
      jax.random.key(config.seed), patches, jnp.zeros(1, jnp.int32)
    )
  )["params"]
  head = jnp.zeros(
    (vision.hidden_size, 3 + len(scenes_lib.SHAPES) + len(scenes_lib.COLORS))
  )
  scenes = functools.partial(batches.dense_scene, seed=config.seed + 2)
  data = batches.iterate(scenes, settings.batch_size, settings.num_steps)
  loss = lambda params, scene, key: train.vision_loss(tower, params, scene)
  optimizer = train.adamw(
    settings.learning_rate, settings.num_steps, settings.warmup
  )
  watch = functools.partial(log, config.log_every)
  return train.fit(
    loss, {"tower": params, "head": head}, optimizer, data, config.seed, watch
  )["tower"]


def from_nothing(
  config: ml_collections.ConfigDict, tokenizer: tokenization.TextTokenizer
):
  """Returns trained towers, a fresh policy and the sizes."""
  sizes = small_bagel.sizes(config.model)
  autoencoder, sizes = train_autoencoder(config, sizes)
  modules, _ = _model(sizes, tokenizer)
  fresh = lambda: nn.unbox(
    parameters.init(modules.bagel, jax.random.key(config.seed))
  )
  weights = {
    "autoencoder": autoencoder,
    "vision": train_vision(config, sizes),
    "policy": jax.jit(fresh)(),
  }
  return weights, sizes


def from_start(folder: str, tokenizer: tokenization.TextTokenizer):
  """Returns weights and sizes of a model to go on with.

  Raises:
    ValueError: the folder holds no such model, or one of another vocabulary.
  """
  sizes = bagel_config.load(folder)
  if tokenizer_files.load(folder).vocabulary != tokenizer.vocabulary:
    raise ValueError(
      f"the vocabulary of config.start must be this world's; it differs: {folder}"
    )
  return bagel_files.load(folder, sizes), sizes


def _model(
  sizes: architecture.BagelConfig, tokenizer: tokenization.TextTokenizer
):
  towers = image_encoders.Towers(sizes, (scenes_lib.CANVAS, scenes_lib.CANVAS))
  return actors.Modules(network.Bagel(sizes), towers), small_bagel.sft_settings(
    tokenizer, towers
  )


def train_policy(
  config: ml_collections.ConfigDict,
  sizes: architecture.BagelConfig,
  tokenizer,
  weights,
  save,
):
  """Trains the policy of the weights, texts alone and then all; hands it to `save` now and then."""
  modules, settings = _model(sizes, tokenizer)
  joint, frozen = (
    config.joint,
    {name: weights[name] for name in ("autoencoder", "vision")},
  )
  training = train.JointTraining(
    modules, settings, frozen, joint.copies, joint.flow_weight, shift=3.0
  )
  policy = weights["policy"]
  for number, (loss, stage) in enumerate(
    ((training.text_loss, config.text), (training.loss, joint))
  ):
    seed = 2 * config.seed + number
    encoder = batches.Encoder(
      prompts.by_tag(prompts.train_records()),
      tokenizer,
      settings.capacities,
      batches.Mix(**config.mix),
      seed,
    )
    data = batches.iterate(encoder, stage.batch_size, stage.num_steps)
    optimizer = train.adamw(stage.learning_rate, stage.num_steps, stage.warmup)

    def watch(step: int, policy, metrics: dict, last=stage.num_steps):
      log(config.log_every, step, policy, metrics)
      if step % config.save_every == 0 or step == last:
        save(frozen | {"policy": policy})

    policy = train.fit(loss, policy, optimizer, data, seed, watch)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  logging.set_verbosity(logging.INFO)
  config, out = _CONFIG.value, pathlib.Path(_OUT.value)
  meshes.use_all_cores(
    math.gcd(
      *(
        config[stage].batch_size
        for stage in ("autoencoder", "vision", "text", "joint")
      )
    )
  )
  words = vocabulary.build_tokenizer()
  tokenizer = tokenization.TextTokenizer(words)
  try:
    start = from_start(config.start, tokenizer) if config.start else None
  except ValueError as error:
    sys.exit(f"r3jax: {error}")
  out.mkdir(parents=True, exist_ok=True)
  words.save(str(out / "tokenizer.json"))
  weights, sizes = start or from_nothing(config, tokenizer)

  def save(weights):
    bagel_files.save(weights, sizes, out, config.stored_dtype)
    logging.info("wrote %s", out)

  save(weights)  # the towers are done
  train_policy(config, sizes, tokenizer, weights, save)


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "out"])
  app.run(main)

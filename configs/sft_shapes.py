"""Trains the small BAGEL that r3jax ships: `python launch/sft.py --config=configs/sft_shapes.py --out=DIR`.

Half good on purpose: part of the plans and instructions it learns from are wrong in systematic
ways, so that reinforcement learning has something to mend in both halves.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """Returns the config of the supervised run on the embedded world."""
  config = ml_collections.ConfigDict()
  config.seed = 0
  # go on with the model of this BAGEL folder: only text and flow are trained
  config.start = ""

  model = config.model = ml_collections.ConfigDict()
  model.hidden_size = 128
  model.intermediate_size = 384
  model.num_layers = 4
  model.num_heads = 4
  model.num_kv_heads = 2
  model.vision_hidden_size = 96
  model.vision_intermediate_size = 192
  model.vision_num_layers = 2
  model.vision_num_heads = 4
  model.autoencoder_channels = 32
  model.autoencoder_multipliers = (1, 1, 2, 4)

  autoencoder = config.autoencoder = ml_collections.ConfigDict()
  autoencoder.num_steps = 1300
  autoencoder.batch_size = 16
  autoencoder.learning_rate = 2e-3
  autoencoder.warmup = 50
  autoencoder.kl_weight = 3e-5

  vision = config.vision = ml_collections.ConfigDict()
  vision.num_steps = 600
  vision.batch_size = 64
  vision.learning_rate = 2e-3
  vision.warmup = 50

  text = config.text = ml_collections.ConfigDict()
  text.num_steps = 1500
  text.batch_size = 64  # examples of each kind
  text.learning_rate = 2e-3
  text.warmup = 100

  joint = config.joint = ml_collections.ConfigDict()
  joint.num_steps = 2400
  joint.batch_size = 32  # examples of each kind
  joint.learning_rate = 2e-3
  joint.warmup = 100
  joint.copies = 3  # noisy copies of every image
  joint.flow_weight = 1.0

  mix = config.mix = ml_collections.ConfigDict()
  mix.plan_flaws = 0.5
  mix.instruction_flaws = 0.3
  mix.questions = 0.1
  mix.descriptions = 0.25
  # Right from wrong is hardest to tell where every object alone looks right.
  mix.reflect_tags = {"position": 4.0, "color_attr": 2.0}

  config.log_every = 50
  config.save_every = 250
  # of the written files; training is in float32
  config.stored_dtype = "float16"
  return config.lock()

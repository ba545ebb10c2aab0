"""Trains the small BAGEL that comes with r3jax.

  python launch/sft.py --config=configs/sft_shapes.py --out=DIR

The model is half good on purpose: part of the plans and instructions that it learns from are wrong
in systematic ways, so that reinforcement learning has something to mend in both halves.
"""

import ml_collections

ConfigDict = ml_collections.ConfigDict


def get_config() -> ConfigDict:
  """Returns the config of the supervised run on the embedded world."""
  config = ConfigDict()
  # Seed of parameters, examples and noise.
  config.seed = 0
  # Folder of a model to go on with: only its texts and images are trained. "" starts from nothing.
  config.start = ""
  config.log_every = 50  # steps
  config.save_every = 200  # steps; an interrupted run goes on from there
  # Type of the numbers in the written files; training is in float32.
  config.stored_dtype = "float16"

  model = config.model = ConfigDict()
  model.hidden_size = 128  # of the language model
  model.intermediate_size = 384
  model.num_layers = 4
  model.num_heads = 4
  model.num_kv_heads = 2  # every key/value head serves two query heads
  model.vision_hidden_size = 96  # of the ViT
  model.vision_intermediate_size = 192
  model.vision_num_layers = 2
  model.vision_num_heads = 4
  model.autoencoder_channels = 32  # of the first level
  # Channels of every level, in units of these; a level has half the sides of the one before.
  model.autoencoder_multipliers = (1, 1, 2, 4)

  autoencoder = config.autoencoder = ConfigDict()
  autoencoder.num_steps = 1300
  autoencoder.batch_size = 16  # scenes
  autoencoder.learning_rate = 2e-3  # peak; it falls to 1 % as a cosine
  autoencoder.warmup = 50  # steps
  autoencoder.kl_weight = 3e-5  # of the posterior's KL beside the pixels' MSE

  # The ViT learns to tell what every cell of a scene holds.
  vision = config.vision = ConfigDict()
  vision.num_steps = 600
  vision.batch_size = 64  # scenes
  vision.learning_rate = 2e-3
  vision.warmup = 50

  # Thoughts, reflections and answers alone.
  text = config.text = ConfigDict()
  text.num_steps = 1500
  text.batch_size = 64  # examples of each kind
  text.learning_rate = 2e-3
  text.warmup = 100

  # Texts and images together.
  joint = config.joint = ConfigDict()
  joint.num_steps = 2400
  joint.batch_size = 32  # examples of each kind
  joint.learning_rate = 2e-3
  joint.warmup = 100
  joint.copies = 3  # noisy copies of every image
  joint.flow_weight = 1.0  # of the flow MSE beside the cross-entropies

  # Held-out scores while the policy is trained, see `r3jax/sft/curves.py`.
  exam = config.exam = ConfigDict()
  exam.every = 200  # steps
  exam.prompts = 16  # of each tag, for drafts and edits
  exam.images = (
    32  # right scenes of each tag that are judged; as many are wrong
  )
  exam.points = 12  # times of the ODE's schedule
  exam.batch_size = 96  # images that are drawn at once
  exam.seed = 1  # of prompts, scenes and noise; the same for every config.seed

  # Training on texts and images ends where all of these hold.
  window = config.window = ConfigDict()
  window.draft = (0.60, 0.75)  # score over all tags
  window.edit = 0.9  # least share of exact edits after the right instruction
  window.judgement = (0.60, 0.80)  # balanced accuracy on every tag
  window.answer = (0.60, 0.85)  # balanced accuracy on every kind of question

  # Shares of the kinds of examples.
  mix = config.mix = ConfigDict()
  mix.plan_flaws = 0.5  # of the plans that are wrong
  mix.instruction_flaws = 0.3  # of the instructions that do not help
  # Of the scenes that are systematically misjudged (`r3jax/worlds/shapes/examples.py`), those with
  # a wrong verdict; of the questions about some of them, those with a wrong answer.
  mix.judgement_flaws = 0.75
  mix.answer_flaws = 0.75
  mix.questions = (
    0.1  # of the reflect examples that ask something else about the image
  )
  mix.descriptions = 0.25  # of the reflect examples that ask what is there
  # How often a tag is drawn for reflect examples, relative to the others. Right from wrong is
  # hardest to tell where every object alone looks right.
  mix.reflect_tags = ConfigDict({"position": 4.0, "color_attr": 2.0})
  return config.lock()

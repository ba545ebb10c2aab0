"""Builds what is measured: a session of the config's sizes with random weights and prompts."""

from collections.abc import Sequence
import dataclasses

from etils import epath
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from r3jax import types
from r3jax.agent import experience
from r3jax.aot import abstract
from r3jax.benchmark import config_rules
from r3jax.checkpoint import pretrained
from r3jax.data import contamination
from r3jax.data import records
from r3jax.model import architecture
from r3jax.model import autoencoder
from r3jax.model import image_encoders
from r3jax.model import low_rank
from r3jax.model import network
from r3jax.model import parameters
from r3jax.model import siglip
from r3jax.parallel import meshes
from r3jax.parallel import sharding
from r3jax.rewards import combine
from r3jax.rl import train_state
from r3jax.run import model_setup
from r3jax.run import sessions
from r3jax.run import setup
from r3jax.run import stage_settings
from r3jax.sequence import protocol
from r3jax.sequence import thoughts

SPECIAL_IDS = protocol.SpecialIds(0, 1, 2, 3)
_FIRST_WORD = 4  # the first id behind the markers
# A feature that all embeddings have, and what the head of the end token makes of it: texts never
# end early.
_COMMON_FEATURE = 10.0
_HEAD_OF_END = -4.0


def model_sizes(config: ml_collections.ConfigDict) -> architecture.BagelConfig:
  """Returns the sizes of a config's model, which keeps the size of the config's images."""
  sizes = config.sizes
  vision_stride = architecture.VisionConfig.patch_size
  return architecture.BagelConfig(
    llm=architecture.LLMConfig(
      hidden_size=sizes.hidden_size,
      intermediate_size=sizes.intermediate_size,
      num_layers=sizes.num_layers,
      num_heads=sizes.num_heads,
      num_kv_heads=sizes.num_kv_heads,
      vocab_size=sizes.vocab_size,
    ),
    vision=architecture.VisionConfig(
      hidden_size=sizes.vision_hidden_size,
      intermediate_size=sizes.vision_intermediate_size,
      num_layers=sizes.vision_num_layers,
      num_heads=sizes.vision_num_heads,
    ),
    autoencoder=architecture.AutoencoderConfig(
      channels=sizes.autoencoder_channels,
      multipliers=tuple(sizes.autoencoder_multipliers),
      num_res_blocks=sizes.autoencoder_blocks,
    ),
    special_ids=SPECIAL_IDS,
    autoencoder_transform=_transform(config.image, config_rules.TOKEN_SIDE),
    vision_transform=_transform(config.image, vision_stride),
  )


def _transform(
  image: ml_collections.ConfigDict, stride: int
) -> architecture.ImageTransform:
  """Returns the rule that cuts sides to multiples of the stride, and keeps them otherwise."""
  sides = [side // stride * stride for side in (image.height, image.width)]
  return architecture.ImageTransform(max(sides), min(sides), stride)


@dataclasses.dataclass(frozen=True)
class RandomWeights(pretrained.Pretrained):
  """Stands for a folder of weights: draws them where a run reads them."""

  def load(
    self,
    bagel: network.Bagel,
    mesh: jax.sharding.Mesh,
    dtype: types.DType = jnp.float32,
    policy_dtype: types.DType | None = None,
  ) -> tuple[types.Params, types.Params]:
    """Draws what `Pretrained.load` reads; arguments and results are the same."""
    plain = bagel.clone(lora=low_rank.LoRA())

    def draw_policy() -> types.Params:
      policy = nn.unbox(parameters.init(plain, jax.random.key(0)))
      policy = _never_ending(policy)
      return _cast(policy, policy_dtype or dtype)

    def draw_towers() -> types.Params:
      return _cast(random_towers(self.sizes), dtype)

    policy_shardings = parameters.shardings(plain, mesh)
    # Compiled, so that the forward passes of the initialization do not run.
    policy = jax.jit(draw_policy, out_shardings=policy_shardings)()
    replicated = sharding.replicated(mesh)
    towers = jax.jit(draw_towers, out_shardings=replicated)()
    return policy, towers


def _cast(params: types.Params, dtype: types.DType) -> types.Params:
  return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def _never_ending(policy: types.Params) -> types.Params:
  """Returns a policy that gives the end token hardly any probability, whatever it reads."""
  table = policy["embed_tokens"]["embedding"]
  head = policy["lm_head"]["kernel"]
  table = table.at[:, 0].set(_COMMON_FEATURE)
  head = head.at[0, SPECIAL_IDS.text_end].set(_HEAD_OF_END)
  return policy | {
    "embed_tokens": {"embedding": table},
    "lm_head": {"kernel": head},
  }


def random_towers(sizes: architecture.BagelConfig) -> types.Params:
  """Draws {"vision", "autoencoder"}; no parameter depends on the size of the images."""
  vision_key, autoencoder_key = jax.random.split(jax.random.key(1))
  vision = siglip.VisionTransformer(sizes.vision)
  patch_dim = 3 * sizes.vision.patch_size**2
  vision_variables = vision.init(
    vision_key, jnp.zeros((1, 1, patch_dim)), np.zeros(1, np.int32)
  )
  image_tower = autoencoder.Autoencoder(
    sizes.autoencoder, latent_patch=sizes.latent_patch
  )
  side = sizes.pixels_per_token
  image_variables = image_tower.init(
    autoencoder_key, jnp.zeros((1, side, side, 3))
  )
  return {
    "vision": nn.unbox(vision_variables["params"]),
    "autoencoder": nn.unbox(image_variables["params"]),
  }


def random_prompts(
  config: ml_collections.ConfigDict, groups: int
) -> experience.Prompts:
  """Draws prompts and questions that fill their segments, one row per group."""
  rng = np.random.default_rng(0)

  def segment(capacity: int) -> np.ndarray:
    shape = (groups, capacity)
    ids = rng.integers(_FIRST_WORD, config.sizes.vocab_size, shape, np.int32)
    ids[:, 0] = SPECIAL_IDS.text_begin
    ids[:, -1] = SPECIAL_IDS.text_end
    return ids

  sequence = config.sequence
  return experience.Prompts(
    ids=segment(sequence.prompt_tokens),
    length=np.full(groups, sequence.prompt_tokens, np.int32),
    question=segment(sequence.question_tokens),
    question_length=np.full(groups, sequence.question_tokens, np.int32),
    target=np.zeros(groups, np.int32),
    index=np.arange(groups, dtype=np.int32),
  )


def _parser(capacity: int) -> thoughts.Parse:
  """Returns a parser that takes the begin of every text for an instruction of `capacity` slots."""

  def parse(ids: types.TokenIds, lengths: types.Lengths, stage: str):
    del lengths, stage
    rows, slots = ids.shape
    columns = np.minimum(np.arange(capacity), slots - 1)
    instruction = ids[:, columns].at[:, -1].set(SPECIAL_IDS.text_end)
    return thoughts.Parsed(
      format=jnp.ones(rows, jnp.float32),
      instruction=instruction,
      instruction_length=jnp.full(rows, capacity, jnp.int32),
      stop=jnp.zeros(rows, bool),
      truncated=jnp.zeros(rows, bool),
    )

  return parse


def _brightness(
  images: types.Images, target, needed: types.Flags | None = None
) -> types.Score:
  """Scores images by their mean brightness, in [0, 1]; the reward is not what is measured."""
  del target, needed
  value = jnp.mean(images.astype(jnp.float32), axis=(1, 2, 3)) / 255
  strict = jnp.zeros_like(value)
  return types.Score(value, jnp.ones_like(value, bool), {"strict": strict})


def _encode_nothing(prompts: Sequence[records.Prompt]) -> np.ndarray:
  return np.zeros(len(prompts), np.int32)


def build(
  config: ml_collections.ConfigDict,
) -> tuple[sessions.Session, types.Params]:
  """Builds a session and the policy before training.

  Args:
    config: see `configs/benchmark.py`; its values have been checked.

  Raises:
    ValueError: the config cannot run on the devices; the message says what must hold.
  """
  sizes = model_sizes(config)
  dtype = model_setup.DTYPES[config.model.dtype]
  image_size = (config.image.height, config.image.width)
  towers = image_encoders.Towers(sizes, image_size, dtype)
  tokenizer = abstract.TokenCounter(sizes.special_ids)
  parse = _parser(config.sequence.instruction_tokens)
  experiment = setup.Experiment(
    world=None,
    pretrained=RandomWeights(epath.Path("random"), sizes, tokenizer),
    modules=model_setup.make_modules(config, sizes, towers),
    rollout=stage_settings.for_rollouts(config, tokenizer, towers),
    settings=stage_settings.for_iteration(config),
    optimizer=train_state.OptimizerSettings(**config.optimizer),
    train=(),
    heldout=(),
    contamination=contamination.Contamination({}),
    reward=combine.GraphReward(
      _encode_nothing, lambda mesh: _brightness, ("strict",)
    ),
    parse=lambda mesh: parse,
    parses_on_host=False,
    places=dict,
  )
  mesh = meshes.make_mesh(**config.mesh)
  stages = experiment.stages(mesh)
  policy, frozen = experiment.start(mesh, config.seed)
  session = sessions.Session(
    config=config,
    files=None,
    experiment=experiment,
    mesh=mesh,
    stages=stages,
    prompts=random_prompts(config, config.groups_per_step),
    frozen=frozen,
    evaluation=None,
    leaked=contamination.Leaked({}, True),
  )
  return session, policy

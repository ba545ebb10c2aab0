"""From a config to the frozen values that a run computes with; everything is checked here.

This, `rewards/registry.py` and `evaluation/build.py` are the only places below `launch/` and `train.py` that
read a ConfigDict.
"""

from collections.abc import Callable, Sequence
import dataclasses

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from r3jax import types
from r3jax.agent import actors
from r3jax.agent import experience
from r3jax.agent import rollout_settings
from r3jax.checkpoint import pretrained as pretrained_lib
from r3jax.data import contamination as contamination_lib
from r3jax.data import records
from r3jax.data import sets as sets_lib
from r3jax.model import architecture
from r3jax.model import image_encoders
from r3jax.model import low_rank
from r3jax.model import network
from r3jax.model import parameters
from r3jax.model import preprocess
from r3jax.parallel import sharding
from r3jax.rewards import combine
from r3jax.rewards import registry
from r3jax.rl import iteration_settings
from r3jax.rl import placement
from r3jax.rl import replica_stages
from r3jax.rl import train_state
from r3jax.sampling import classifier_free
from r3jax.sampling import decoding
from r3jax.sampling import schedules
from r3jax.sequence import host_parser
from r3jax.sequence import layouts
from r3jax.sequence import protocol
from r3jax.sequence import thoughts
from r3jax.sequence import tokenization
from r3jax.worlds import base as worlds_base
from r3jax.worlds import registry as worlds_registry

DTYPES = {
  "float32": jnp.float32,
  "bfloat16": jnp.bfloat16,
  "float64": jnp.float64,
}


@dataclasses.dataclass(frozen=True)
class Base:
  """The model of a config and how it samples.

  Attributes:
    world: that of the config, if it names one.
    pretrained: the model's folder: weights and tokenizer.
    modules: the model.
    rollout: how it samples.
  """

  world: worlds_base.World | None
  pretrained: pretrained_lib.Pretrained
  modules: actors.Modules
  rollout: rollout_settings.RolloutSettings

  def segments(
    self, texts: Sequence[str], capacity: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids [B, capacity] and lengths [B] (int32) of text segments.

    Raises:
      ValueError: a text does not fit, or holds unknown words.
    """
    ids, lengths = zip(
      *(self.pretrained.tokenizer.segment(text, capacity) for text in texts)
    )
    return np.stack(ids), np.array(lengths, np.int32)

  def decode(self, ids: np.ndarray, lengths: np.ndarray) -> list[str]:
    """Returns the texts of segments, ids [B, T], without their begin and end."""
    decode = self.pretrained.tokenizer.decode
    return [
      decode(row[1 : length - 1].tolist())
      for row, length in zip(np.asarray(ids), np.asarray(lengths))
    ]


@dataclasses.dataclass(frozen=True)
class Experiment(Base):
  """A run's constants.

  Attributes (beside those of `Base`):
    settings: what an iteration learns from, and how.
    optimizer: settings of AdamW.
    train, heldout: the prompts of the training set and of the held-out set.
    contamination: what the two had in common.
    reward: scores images.
    parse: makes the text parser from the mesh.
    parses_on_host: whether the parser calls back to the host.
  """

  settings: iteration_settings.IterationSettings
  optimizer: train_state.OptimizerSettings
  train: tuple[records.Prompt, ...]
  heldout: tuple[records.Prompt, ...]
  contamination: contamination_lib.Contamination
  reward: combine.GraphReward
  parse: Callable[[jax.sharding.Mesh], thoughts.Parse]
  parses_on_host: bool

  @property
  def on_host(self) -> bool:
    """Whether the step calls back to the host."""
    return self.parses_on_host or bool(self.reward.scorers)

  def stages(self, mesh: jax.sharding.Mesh) -> replica_stages.ReplicaStages:
    """Returns the stages of an iteration on a mesh.

    Raises:
      ValueError: the samples do not split over the mesh's replicas.
    """
    replicas = mesh.shape[placement.AXIS]
    placement.check(
      self.settings.num_groups,
      self.settings.group_size,
      replicas,
      self.settings.num_micro_batches,
    )
    optimizer = train_state.make_optimizer(self.optimizer)
    return replica_stages.ReplicaStages(
      self.modules,
      self.rollout,
      self.settings,
      self.reward.on(mesh),
      self.parse(mesh),
      optimizer,
      replicas,
    )

  def load(self, mesh: jax.sharding.Mesh) -> tuple[types.Params, types.Params]:
    """Returns the sharded policy and the replicated frozen parameters.

    The policy is in float32 or the wider dtype computed in; where it is only the base of adapters, in
    the dtype computed in, as the frozen parameters are.
    """
    bagel = self.modules.bagel
    dtype = jnp.promote_types(bagel.dtype, jnp.float32)
    policy, frozen = self.pretrained.load(
      bagel, mesh, dtype, bagel.dtype if bagel.lora.rank else None
    )
    return policy, parameters.narrowed(frozen, bagel.dtype)

  def start(
    self, mesh: jax.sharding.Mesh, seed: int
  ) -> tuple[types.Params, train_state.Frozen]:
    """Returns what training changes and what it reads, before the first iteration.

    Args:
      mesh: to shard the parameters over.
      seed: of the adapters, where only these are trained.
    """
    (policy, towers), bagel = self.load(mesh), self.modules.bagel
    needs_reference = self.settings.loss.needs_reference
    if not bagel.lora.rank:
      return policy, train_state.Frozen(
        towers,
        parameters.narrowed(policy, bagel.dtype) if needs_reference else None,
      )
    return parameters.init_adapters(bagel, mesh, seed), train_state.Frozen(
      towers, {} if needs_reference else None, policy
    )

  def encode(self, prompts: tuple[records.Prompt, ...]) -> experience.Prompts:
    """Returns the arrays of prompts, one row per prompt (numpy).

    Raises:
      ValueError: a prompt does not fit into its segment.
    """
    capacities = self.rollout.capacities
    texts = [prompt.text for prompt in prompts]
    questions = [protocol.reflection_question(text) for text in texts]
    return experience.Prompts(
      *self.segments(texts, capacities.prompt),
      *self.segments(questions, capacities.question),
      self.reward.encode(prompts),
      np.arange(len(prompts), dtype=np.int32),
    )


def balanced(prompts: Sequence[records.Prompt]) -> tuple[records.Prompt, ...]:
  """Returns the prompts with the rarer tags repeated, so that every tag is drawn about as often."""
  by_tag: dict[str, list[records.Prompt]] = {}
  for prompt in prompts:
    by_tag.setdefault(prompt.tag, []).append(prompt)
  most = max(len(group) for group in by_tag.values())
  return tuple(
    group[i % len(group)] for group in by_tag.values() for i in range(most)
  )


def evenly(
  prompts: Sequence[records.Prompt], number: int, seed: int
) -> tuple[records.Prompt, ...]:
  """Returns a fixed subset of about `number` prompts, the same number of every tag (0 = all)."""
  if not number:
    return tuple(prompts)
  by_tag: dict[str, list[records.Prompt]] = {}
  for i in np.random.default_rng(seed).permutation(len(prompts)):
    by_tag.setdefault(prompts[i].tag, []).append(prompts[i])
  each = -(-number // len(by_tag))
  return tuple(
    group[i % len(group)] for group in by_tag.values() for i in range(each)
  )


def _flow(section: ml_collections.ConfigDict) -> rollout_settings.FlowSettings:
  return rollout_settings.FlowSettings(
    schedules.Schedule(section.points, section.shift),
    classifier_free.Guidance(
      section.text_scale,
      section.image_scale,
      section.renorm,
      section.renorm_min,
      tuple(section.interval),
    ),
    schedules.Eta(section.eta_mode, section.eta),
    section.sde_index_max,
  )


def _capacities(
  config, tokenizer, towers: image_encoders.Towers
) -> layouts.Capacities:
  s = config.sequence
  return layouts.Capacities(
    system=max(
      len(_system(tokenizer, text))
      for text in (protocol.GEN_THINK, protocol.VLM_THINK)
    ),
    prompt=s.prompt_tokens,
    thought=s.thought_tokens + 1,
    question=s.question_tokens,
    answer=s.answer_tokens + 1,
    instruction=s.instruction_tokens,
    latent_grid=towers.latent_grid,
    vit_grid=towers.vit_grid,
  )


def _system(
  tokenizer: tokenization.TextTokenizer, text: str
) -> tuple[int, ...]:
  ids = tokenizer.special_ids
  return (ids.text_begin, *tokenizer.encode(text), ids.text_end)


def make_rollout_settings(
  config, tokenizer, towers: image_encoders.Towers
) -> rollout_settings.RolloutSettings:
  """Returns how the model of a config samples in training."""
  text = decoding.TextSampling(
    config.text.temperature,
    config.text.top_p,
    config.text.top_k,
    placement.AXIS,
  )
  return rollout_settings.RolloutSettings(
    capacities=_capacities(config, tokenizer, towers),
    reason_text=text,
    reflect_text=text,
    reason_flow=_flow(config.reason),
    refine_flow=_flow(config.refine),
    system_reason=_system(tokenizer, protocol.GEN_THINK),
    system_reflect=_system(tokenizer, protocol.VLM_THINK),
    reference_loss=config.compat.reference_loss,
  )


def make_iteration_settings(
  config: ml_collections.ConfigDict,
) -> iteration_settings.IterationSettings:
  """Returns what an iteration of a config learns from, and how."""
  return iteration_settings.IterationSettings(
    num_groups=config.groups_per_step,
    group_size=config.group_size,
    loss=iteration_settings.LossSettings(**config.loss),
    pool_perfect=config.pool.perfect,
    num_reflect_rounds=config.reflect_rounds,
    num_micro_batches=config.step.micro_batches,
  )


def evaluation_settings(
  config, settings: rollout_settings.RolloutSettings
) -> rollout_settings.RolloutSettings:
  """Returns the settings that evaluation samples with: ODE only, its own points and temperature."""
  e = config.eval
  text = dataclasses.replace(settings.reason_text, temperature=e.temperature)

  def flow(
    stage: rollout_settings.FlowSettings,
  ) -> rollout_settings.FlowSettings:
    schedule = dataclasses.replace(stage.schedule, points=e.points)
    return dataclasses.replace(stage, schedule=schedule, sde_index_max=0)

  return dataclasses.replace(
    settings,
    reason_text=text,
    reflect_text=text,
    reason_flow=flow(settings.reason_flow),
    refine_flow=flow(settings.refine_flow),
  )


def _parse(
  config, tokenizer, capacity: int
) -> Callable[[jax.sharding.Mesh], thoughts.Parse]:
  if config.sequence.parser == "strings":
    return lambda mesh: host_parser.parse_on_host(tokenizer, capacity, mesh)
  if config.sequence.parser == "tokens":
    tags = thoughts.tag_ids(tokenizer)
    return lambda mesh: (
      lambda ids, lengths, stage: thoughts.parse_tokens(
        ids, lengths, stage, tags, capacity
      )
    )
  raise ValueError(
    f"sequence.parser must be 'strings' or 'tokens'; got {config.sequence.parser!r}"
  )


def make_modules(
  config, sizes: architecture.BagelConfig, towers: image_encoders.Towers
) -> actors.Modules:
  rules, rollout_rules = (
    sharding.Rules.of(config.sharding[part].to_dict())
    for part in ("train", "rollout")
  )
  attention = _attention(config.model.attention, sizes.llm.head_dim)
  bagel = network.Bagel(
    sizes,
    towers.dtype,
    config.model.remat,
    attention,
    rules,
    _lora(config, sizes),
  )
  return actors.Modules(bagel, towers, rollout_rules)


def attention_on(platform: str, head_dim: int) -> str:
  """Returns what attends on a platform: the TPU kernel takes heads whose width is a multiple of 128."""
  return "splash" if platform == "tpu" and head_dim % 128 == 0 else "xla"


def _attention(name: str, head_dim: int) -> str:
  """Checks what the config wants to attend with, and chooses for "auto"."""
  if name not in ("auto", "xla", "splash"):
    raise ValueError(
      f"model.attention must be 'auto', 'xla' or 'splash'; got {name!r}"
    )
  if name == "splash" and attention_on("tpu", head_dim) != name:
    raise ValueError(
      f"model.attention 'splash' needs heads whose width is a multiple of 128; the model's are {head_dim}"
    )
  return (
    attention_on(jax.default_backend(), head_dim) if name == "auto" else name
  )


def _lora(config, sizes: architecture.BagelConfig) -> low_rank.LoRA:
  lora = low_rank.LoRA(**config.model.lora)
  lora.check(sizes.llm)
  if lora.rank and lora.und and config.optimizer.freeze_und:
    raise ValueError(
      f"model.lora.und must be () where optimizer.freeze_und is set, which keeps it; got {lora.und}"
    )
  return lora


def build_base(config: ml_collections.ConfigDict) -> Base:
  """Checks what a config says of the model and its sampling; reads no weights.

  Raises:
    ValueError: the config cannot be run; the message says what must hold and what was seen.
  """
  if config.model.dtype not in DTYPES:
    raise ValueError(
      f"model.dtype must be one of {sorted(DTYPES)}; got {config.model.dtype!r}"
    )
  found, dtype = (
    pretrained_lib.find(config.model.folder, config.world),
    DTYPES[config.model.dtype],
  )
  size = (config.image.height, config.image.width)
  kept = preprocess.target_size(*size, found.sizes.autoencoder_transform)
  if kept != size:
    raise ValueError(
      f"image.height and image.width must be a size that the model keeps; it makes {size} {kept}"
    )
  towers = image_encoders.Towers(found.sizes, size, dtype)
  return Base(
    worlds_registry.find_if_named(config.world),
    found,
    make_modules(config, found.sizes, towers),
    make_rollout_settings(config, found.tokenizer, towers),
  )


def build(config: ml_collections.ConfigDict) -> Experiment:
  """Checks a config and makes what a run computes with; reads no weights.

  Raises:
    ValueError: the config cannot be run; the message says what must hold and what was seen.
  """
  sets = sets_lib.load(sets_lib.Settings(**config.data), _world_records(config))
  return _build(config, balanced(sets.train), sets.heldout, sets.contamination)


def build_to_evaluate(config: ml_collections.ConfigDict) -> Experiment:
  """Does the same without training prompts, which need not be there.

  Raises:
    ValueError: as `build`.
  """
  heldout = load_heldout(config)
  return _build(config, (), heldout, contamination_lib.Contamination({}))


def load_heldout(config: ml_collections.ConfigDict) -> list[records.Prompt]:
  """Loads the whole held-out set of a config.

  Raises:
    ValueError: as `build`.
  """
  return sets_lib.load_heldout(
    sets_lib.Settings(**config.data), _world_records(config)
  )


def _world_records(
  config: ml_collections.ConfigDict,
) -> sets_lib.WorldRecords | None:
  world = worlds_registry.find_if_named(config.world)
  return world.records if world else None


def _build(
  config,
  train: tuple[records.Prompt, ...],
  heldout: list[records.Prompt],
  contamination,
) -> Experiment:
  base = build_base(config)
  _check_canvas(config, base.world)
  return Experiment(
    **vars(base),
    settings=make_iteration_settings(config),
    optimizer=train_state.OptimizerSettings(**config.optimizer),
    train=train,
    heldout=evenly(heldout, config.eval.prompts, config.eval.seed),
    contamination=contamination,
    reward=registry.build(
      config.reward, base.world, (config.image.height, config.image.width)
    ),
    parse=_parse(
      config, base.pretrained.tokenizer, base.rollout.capacities.instruction
    ),
    parses_on_host=config.sequence.parser == "strings",
  )


def _check_canvas(
  config: ml_collections.ConfigDict, world: worlds_base.World | None
) -> None:
  """Checks that images have the size that the world verifies, where it is the reward.

  Raises:
    ValueError: they have another size.
  """
  size = (config.image.height, config.image.width)
  verifies = config.reward.name == worlds_registry.OF_WORLD
  if verifies and world and world.canvas != size:
    raise ValueError(
      f"image.height and image.width must be the canvas of the world {world.name!r}, "
      f"{world.canvas}; got {size}"
    )

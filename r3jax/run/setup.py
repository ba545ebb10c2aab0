"""Builds the experiment that a config describes, and checks all of it; reads no weights.

Together with its neighbours `model_setup`, `stage_settings`, `evaluation_setup` and `sessions`, and
with `rewards/registry`, it turns the config into values. No package below reads one.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools

from absl import logging
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from r3jax import types
from r3jax.agent import experience
from r3jax.data import contamination as contamination_lib
from r3jax.data import records
from r3jax.data import sets
from r3jax.model import parameters
from r3jax.rewards import combine
from r3jax.rewards import registry
from r3jax.rl import iteration_settings
from r3jax.rl import placement
from r3jax.rl import replica_stages
from r3jax.rl import train_state
from r3jax.run import model_setup
from r3jax.run import prompt_selection
from r3jax.run import stage_settings
from r3jax.sequence import host_parser
from r3jax.sequence import protocol
from r3jax.sequence import thoughts
from r3jax.worlds import base as worlds_base
from r3jax.worlds import registry as worlds_registry


@dataclasses.dataclass(frozen=True)
class Experiment(model_setup.ModelSetup):
  """Everything that a config describes, apart from the mesh and the weights.

  Attributes (beside those of `ModelSetup`):
    settings: What an iteration learns from, and how.
    optimizer: Settings of AdamW.
    train: Prompts of the training set.
    heldout: Prompts of the held-out set.
    contamination: Training prompts that are in the test set too, before any was dropped.
    reward: Scores images.
    own_evaluation_reward: Scores the images of evaluations; None where `reward` does.
    parse: Builds the parser of sampled text for a mesh.
    parses_on_host: Whether the parser calls back to the host.
    places: Returns where prompts stand in files, "FILE:LINE" by prompt, for messages.
  """

  settings: iteration_settings.IterationSettings
  optimizer: train_state.OptimizerSettings
  train: tuple[records.Prompt, ...]
  heldout: tuple[records.Prompt, ...]
  contamination: contamination_lib.Contamination
  reward: combine.GraphReward
  parse: Callable[[jax.sharding.Mesh], thoughts.Parse]
  parses_on_host: bool
  places: Callable[[], Mapping[records.Prompt, str]]
  own_evaluation_reward: combine.GraphReward | None = None

  @property
  def evaluation_reward(self) -> combine.GraphReward:
    """Scores the images of evaluations."""
    return self.own_evaluation_reward or self.reward

  @property
  def on_host(self) -> bool:
    """Whether the step calls back to the host."""
    return self.parses_on_host or bool(self.reward.scorers)

  def stages(self, mesh: jax.sharding.Mesh) -> replica_stages.ReplicaStages:
    """Returns the stages of an iteration on a mesh.

    Raises:
      ValueError: The samples do not split over the mesh's replicas.
    """
    num_replicas = mesh.shape[placement.AXIS]
    placement.check(
      self.settings.num_groups,
      self.settings.group_size,
      num_replicas,
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
      num_replicas,
    )

  def load(self, mesh: jax.sharding.Mesh) -> tuple[types.Params, types.Params]:
    """Reads the sharded policy and the replicated frozen parameters.

    The policy is in float32, or in the wider dtype that the model computes in. All others, with
    adapters also the policy, have the dtype that it computes in.
    """
    bagel = self.modules.bagel
    trained_dtype = jnp.promote_types(bagel.dtype, jnp.float32)
    # The base of adapters is never updated, so that it needs no float32 copy.
    has_adapters = bagel.lora.rank > 0
    policy, towers = self.pretrained.load(
      bagel, mesh, trained_dtype, bagel.dtype if has_adapters else None
    )
    return policy, parameters.narrowed(towers, bagel.dtype)

  def start(
    self, mesh: jax.sharding.Mesh, seed: int
  ) -> tuple[types.Params, train_state.Frozen]:
    """Returns the parameters that training changes, and those that it reads, before training.

    Args:
      mesh: Mesh to shard the parameters over.
      seed: Seed of the adapters, where only these are trained.
    """
    policy, towers = self.load(mesh)
    bagel = self.modules.bagel
    needs_reference = self.settings.loss.needs_reference
    if bagel.lora.rank:
      adapters = parameters.init_adapters(bagel, mesh, seed)
      # Without adapters the policy is the reference.
      reference = {} if needs_reference else None
      return adapters, train_state.Frozen(towers, reference, base=policy)
    base = None
    if self.optimizer.freeze_und:
      # Nothing of it is trained, so that the dtype it is computed in suffices.
      und, policy = parameters.split_experts(policy)
      base = parameters.narrowed(und, bagel.dtype)
    reference = None
    if needs_reference:
      # It is never updated, so that the dtype it is computed in suffices.
      reference = parameters.narrowed(policy, bagel.dtype)
    return policy, train_state.Frozen(towers, reference, base)

  def encode(
    self,
    prompts: tuple[records.Prompt, ...],
    reward: combine.GraphReward | None = None,
  ) -> experience.Prompts:
    """Returns prompts as numpy arrays, one row per prompt.

    Args:
      prompts: What images must show.
      reward: What reads the targets; None takes that of training.

    Raises:
      ValueError: Prompts do not fit into their segments, or lack what the reward needs; lists them
        with their lines.
    """
    reward = reward or self.reward
    try:
      return self._encode(prompts, reward)
    except ValueError as error:
      problems = self._problems(prompts, reward)
      if not problems:  # not of a prompt alone
        raise
      raise ValueError(records.problems_text(problems)) from error

  def _problems(
    self, prompts: tuple[records.Prompt, ...], reward: combine.GraphReward
  ) -> list[str]:
    """Returns a line for every prompt that cannot be encoded: its place, and why."""
    places = self.places()
    problems = []
    for prompt in dict.fromkeys(prompts):
      try:
        self._encode((prompt,), reward)
      except ValueError as error:
        place = places.get(prompt)
        problems.append(f"{place}: {error}" if place else str(error))
    return problems

  def _encode(
    self, prompts: tuple[records.Prompt, ...], reward: combine.GraphReward
  ) -> experience.Prompts:
    """Encodes prompts as `encode` does."""
    capacities = self.rollout.capacities
    texts = [prompt.text for prompt in prompts]
    questions = [protocol.reflection_question(text) for text in texts]
    return experience.Prompts(
      *self.segments(texts, capacities.prompt),
      *self.segments(questions, capacities.question),
      reward.encode(prompts),
      np.arange(len(prompts), dtype=np.int32),
    )


def build(config: ml_collections.ConfigDict) -> Experiment:
  """Checks a config and builds its experiment.

  Raises:
    ValueError: The config cannot be used; the message has what must hold, and what was given.
  """
  settings = sets.Settings(**config.data)
  prompts = sets.load(settings, _world_records(config))
  train = tuple(prompts.train)
  if settings.balance == "tag":
    train = prompt_selection.balanced(train)
  logging.info(
    "training prompts (data.balance is %r):\n%s",
    settings.balance,
    prompt_selection.describe(train),
  )
  return _build(config, train, prompts.heldout, prompts.contamination)


def build_to_evaluate(config: ml_collections.ConfigDict) -> Experiment:
  """Builds the experiment of a config without training prompts, which need not exist.

  Raises:
    ValueError: As `build`.
  """
  no_overlap = contamination_lib.Contamination({})
  return _build(config, (), load_heldout(config), no_overlap)


def load_heldout(config: ml_collections.ConfigDict) -> list[records.Prompt]:
  """Loads the whole held-out set of a config.

  Raises:
    ValueError: As `build`.
  """
  return sets.load_heldout(sets.Settings(**config.data), _world_records(config))


def _world_records(
  config: ml_collections.ConfigDict,
) -> sets.WorldRecords | None:
  """Returns what loads the prompts of the config's world; None without a world."""
  world = worlds_registry.find_if_named(config.world)
  return world.records if world else None


def _build(
  config: ml_collections.ConfigDict,
  train: tuple[records.Prompt, ...],
  heldout: list[records.Prompt],
  contamination: contamination_lib.Contamination,
) -> Experiment:
  model = model_setup.build(config)
  sources = sets.Settings(**config.data)
  if not train:  # an evaluation, whose training prompts need not exist
    sources = dataclasses.replace(sources, train="")
  _check_canvas(config, model.world)
  image_size = (config.image.height, config.image.width)
  reward = registry.build(config.reward, model.world, image_size)
  evaluation_reward = None
  if registry.differs_in_evaluation(config.reward):
    evaluation_reward = registry.build(
      config.reward, model.world, image_size, evaluates=True
    )
  return Experiment(
    **vars(model),
    settings=stage_settings.for_iteration(config),
    optimizer=train_state.OptimizerSettings(**config.optimizer),
    train=train,
    heldout=prompt_selection.evenly(
      heldout, config.eval.prompts, config.eval.seed
    ),
    contamination=contamination,
    reward=reward,
    parse=_parser(config, model),
    parses_on_host=config.sequence.parser == "strings",
    places=functools.partial(sets.places, sources),
    own_evaluation_reward=evaluation_reward,
  )


def _check_canvas(
  config: ml_collections.ConfigDict, world: worlds_base.World | None
) -> None:
  """Checks that images have the size that the world verifies, where it is the reward or a part.

  Raises:
    ValueError: They have another size.
  """
  size = (config.image.height, config.image.width)
  names = {config.reward.name}
  if config.reward.name == "sum":
    names |= {member.get("name") for member in config.reward.members.values()}
  if worlds_registry.OF_WORLD in names and world and world.canvas != size:
    raise ValueError(
      f"image.height and image.width must be the canvas of the world {world.name!r}, "
      f"{world.canvas}; got {size}"
    )


def _parser(
  config: ml_collections.ConfigDict, model: model_setup.ModelSetup
) -> Callable[[jax.sharding.Mesh], thoughts.Parse]:
  """Returns a function that builds the parser of sampled text for a mesh.

  The parser "strings" runs on hosts, "tokens" in the graph; both give the same results.
  """
  tokenizer = model.pretrained.tokenizer
  capacity = model.rollout.capacities.instruction
  if config.sequence.parser == "strings":

    def on_host(mesh: jax.sharding.Mesh) -> thoughts.Parse:
      return host_parser.parse_on_host(tokenizer, capacity, mesh)

    return on_host

  if config.sequence.parser == "tokens":
    tags = thoughts.tag_ids(tokenizer)

    def parse(ids, lengths, stage):
      return thoughts.parse_tokens(ids, lengths, stage, tags, capacity)

    # It does not depend on the mesh.
    return lambda mesh: parse

  raise ValueError(
    f"sequence.parser must be 'strings' or 'tokens'; got {config.sequence.parser!r}"
  )

"""The programs of a run as shapes on the chips of a topology: step, evaluation, generation."""

from collections.abc import Callable, Mapping
import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_collections

from r3jax import inference
from r3jax.agent import experience
from r3jax.agent import random_keys
from r3jax.aot import abstract
from r3jax.costs import count
from r3jax.evaluation import chains
from r3jax.rewards.from_host import scorer
from r3jax.rl import mapped
from r3jax.rl import placement
from r3jax.rl import replica_stages
from r3jax.rl import train_state
from r3jax.run import stage_settings
from r3jax.sequence import host_parser


@dataclasses.dataclass(frozen=True)
class Program:
  """One program and the shapes that it is compiled for.

  Attributes:
    mesh: of the topology's chips.
    function: a jitted function.
    arguments: of the function, shapes with shardings.
    held: kind -> tree of the shapes that a chip holds meanwhile, the arguments included.
  """

  mesh: jax.sharding.Mesh
  function: Callable
  arguments: tuple
  held: Mapping[str, object]

  def lower(self):
    """Traces and lowers the program for the topology."""
    with jax.set_mesh(self.mesh):
      return self.function.lower(*self.arguments)

  def bytes_by_kind(self) -> dict[str, int]:
    """Returns the bytes of every kind that one chip holds."""
    return {kind: abstract.chip_bytes(tree) for kind, tree in self.held.items()}

  def beside(self) -> int:
    """Returns the bytes that a chip holds and that are not arguments of this program."""
    held = sum(self.bytes_by_kind().values())
    return max(held - abstract.chip_bytes(self.arguments), 0)


@dataclasses.dataclass(frozen=True)
class Programs:
  """The programs of one command.

  Attributes:
    programs: by name, in the order in which they run.
    stages: their cost together, by stage.
    samples: number of images that they draw at once.
    layers: number of layers of the language model.
  """

  programs: Mapping[str, Program]
  stages: Mapping[str, count.Cost]
  samples: int
  layers: int


def step(
  config: ml_collections.ConfigDict,
  mesh: jax.sharding.Mesh,
  layers: int | None = None,
) -> Programs:
  """Returns the fused step of a config, with a reward and a text parser on the host.

  Args:
    config: see `configs/r3_geneval.py`; `model.attention` is not "auto".
    mesh: of chips; they need not exist.
    layers: see `abstract.model_sizes`.

  Raises:
    ValueError: the config cannot run on the mesh; the message says what must hold.
  """
  base = abstract.base(config, layers)
  settings = base.settings
  replicas = mesh.shape[placement.AXIS]
  placement.check(
    settings.num_groups,
    settings.group_size,
    replicas,
    settings.num_micro_batches,
  )
  optimizer = _optimizer(config)
  reward, parse = _on_host(base, mesh)
  stages = replica_stages.ReplicaStages(
    base.modules, base.rollout, settings, reward, parse, optimizer, replicas
  )
  # Shapes of what the step takes.
  policy, frozen = abstract.start(
    base.modules, settings.loss, mesh, config.optimizer.freeze_und
  )
  state = abstract.initial_state(policy, optimizer, mesh)
  prompts = abstract.on_mesh(
    abstract.prompts(base.rollout, settings.num_groups), mesh
  )
  seed = abstract.on_mesh(jax.ShapeDtypeStruct((), jnp.uint32), mesh)
  # The state is donated and keeps its shardings, as in a run.
  state_shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
  fused = jax.jit(
    mapped.fused(stages, mesh),
    donate_argnums=0,
    out_shardings=(state_shardings, None, None),
  )
  arguments = (state, frozen, prompts, seed)
  held = _held(state, frozen) | {"prompts": prompts}
  costs = count.iteration(
    base.modules,
    base.rollout,
    settings,
    mesh.shape,
    remat=config.model.remat != "none",
    freeze_und=config.optimizer.freeze_und,
  )
  return Programs(
    programs={"step": Program(mesh, fused, arguments, held)},
    stages=costs,
    samples=settings.num_groups * settings.group_size,
    layers=_num_layers(base),
  )


def evaluation(
  config: ml_collections.ConfigDict,
  mesh: jax.sharding.Mesh,
  layers: int | None = None,
) -> Programs:
  """Returns the draft and the revision of a batch of evaluation, beside the state of training.

  Args and errors are those of `step`.
  """
  base = abstract.base(config, layers)
  settings = stage_settings.for_evaluation(config, base.rollout)
  batch_size = config.eval.batch_size
  reward, parse = _on_host(base, mesh)
  sampler = chains.Sampler(
    base.modules,
    settings,
    reward,
    parse,
    mesh,
    config.eval.rounds,
    batch_size,
    config.eval.seed,
    never_stop=config.eval.never_stop,
  )
  policy, frozen = abstract.start(
    base.modules, base.settings.loss, mesh, config.optimizer.freeze_und
  )
  state = abstract.initial_state(policy, _optimizer(config), mesh)
  held = _held(state, frozen)
  over_replicas = jax.sharding.NamedSharding(
    mesh, jax.sharding.PartitionSpec(placement.AXIS)
  )

  def by_row(tree):
    shardings = jax.tree.map(lambda _: over_replicas, tree)
    return abstract.on_mesh(tree, mesh, shardings)

  prompts = by_row(abstract.prompts(settings, batch_size))
  # prompt, image and round of every row, for its random keys
  numbers = by_row(jax.ShapeDtypeStruct((batch_size, 3), jnp.int32))
  counts = by_row(jax.ShapeDtypeStruct((batch_size,), jnp.bool_))
  rows = (prompts, numbers, counts)
  draft_arguments = (frozen.whole(policy), frozen.towers, *rows)
  with jax.set_mesh(mesh):
    drawn = jax.eval_shape(sampler.draft, *draft_arguments)
  last = by_row(drawn.state)
  revise_arguments = (*draft_arguments, last)
  programs = {
    "draft": Program(
      mesh, sampler.draft, draft_arguments, held | {"images": rows}
    ),
    "revise": Program(
      mesh, sampler.revise, revise_arguments, held | {"images": (rows, last)}
    ),
  }
  return Programs(
    programs=programs,
    stages=count.rollouts(base.modules, settings, mesh.shape, batch_size, 1),
    samples=batch_size,
    layers=_num_layers(base),
  )


def generation(
  config: ml_collections.ConfigDict,
  mesh: jax.sharding.Mesh,
  layers: int | None = None,
  num_images: int = 4,
) -> Programs:
  """Returns the stages of `inference.Model.generate`, for a number of images of one prompt.

  Args and errors are those of `step`.
  """
  base = abstract.base(config, layers)
  stages = inference.make_stages(config, base.modules, base.rollout)
  policy, frozen = abstract.weights(
    stages.modules, mesh, base.modules.bagel.dtype
  )

  def replicated(tree):
    return abstract.on_mesh(tree, mesh)

  def make_keys():
    return random_keys.evaluation_keys(0, jnp.zeros((num_images, 3), jnp.int32))

  def integers(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((num_images, *shape), jnp.int32)

  programs = {}

  def add(name: str, stage: Callable, *arguments):
    """Adds a stage to the programs; returns the shapes of its result."""
    function = jax.jit(functools.partial(stage, stages))
    held = {"parameters": policy, "image towers": frozen, "images": arguments}
    programs[name] = Program(mesh, function, (policy, frozen, *arguments), held)
    with jax.set_mesh(mesh):
      result = jax.eval_shape(function, policy, frozen, *arguments)
    return replicated(result)

  prompts = replicated(abstract.prompts(stages.settings, num_images))
  row_keys = replicated(jax.eval_shape(make_keys))
  instruction = experience.Instruction(
    integers(stages.settings.capacities.instruction),
    integers(),
    jax.ShapeDtypeStruct((num_images,), bool),
  )
  thought = add("think", inference.think, prompts, row_keys)
  images = add("draft", inference.draft, thought, row_keys)
  source = add("look", inference.look, images)
  add("reflect", inference.reflect, prompts, source, row_keys)
  add("refine", inference.refine, source, replicated(instruction), row_keys)
  costs = count.rollouts(
    stages.modules, stages.settings, mesh.shape, num_images, 1
  )
  return Programs(programs, costs, num_images, _num_layers(base))


COMMANDS = {"step": step, "evaluate": evaluation, "generate": generation}


def _num_layers(base: abstract.Base) -> int:
  return base.modules.bagel.config.llm.num_layers


def _optimizer(config: ml_collections.ConfigDict):
  settings = train_state.OptimizerSettings(**config.optimizer)
  return train_state.make_optimizer(settings)


def _on_host(base: abstract.Base, mesh: jax.sharding.Mesh):
  """Returns a reward and a parser that call back to the host."""
  reward = scorer.reward_from_host(abstract.no_reward, ("strict",), mesh)
  capacity = base.rollout.capacities.instruction
  return reward, host_parser.parse_on_host(base.tokenizer, capacity, mesh)


def _held(
  state: train_state.TrainState, frozen: train_state.Frozen
) -> dict[str, object]:
  return {
    "trained parameters": state.policy,
    "optimizer": state.opt_state,
    "frozen parameters": frozen.base,
    "reference": frozen.reference,
    "image towers": frozen.towers,
  }

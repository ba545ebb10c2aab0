"""The programs of a run, abstract on the chips of a topology: the fused step, evaluation, generation."""

from collections.abc import Callable, Mapping
import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_collections

from r3jax import inference
from r3jax.agent import keys as keys_lib
from r3jax.agent import samples as samples_lib
from r3jax.aot import abstract
from r3jax.costs import count
from r3jax.evaluation import draw
from r3jax.rewards.from_host import scorer
from r3jax.rl import iteration as iteration_lib
from r3jax.rl import placement
from r3jax.rl import programs as programs_lib
from r3jax.rl import train_state
from r3jax.run import setup


@dataclasses.dataclass(frozen=True)
class Program:
  """One program and what it is compiled for.

  Attributes:
    mesh: of the topology's chips.
    function: compiled.
    arguments: of the function, shapes with shardings.
    held: kind -> tree of shapes: what a chip holds meanwhile, the arguments among it.
  """

  mesh: jax.sharding.Mesh
  function: Callable
  arguments: tuple
  held: Mapping[str, object]

  def lower(self):
    """Traces the program for the topology."""
    with jax.set_mesh(self.mesh):
      return self.function.lower(*self.arguments)

  def bytes_by_kind(self) -> dict[str, int]:
    """Returns the bytes of every kind that one chip holds."""
    return {name: abstract.chip_bytes(tree) for name, tree in self.held.items()}

  def beside(self) -> int:
    """Returns the bytes of what a chip holds that is none of the arguments."""
    return max(
      sum(self.bytes_by_kind().values()) - abstract.chip_bytes(self.arguments),
      0,
    )


@dataclasses.dataclass(frozen=True)
class Programs:
  """What one command runs.

  Attributes:
    programs: by name, in the order in which they run.
    stages: what they cost together, by stage.
    samples: images that they draw at once.
    layers: of the language model.
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
    mesh: of chips, which may be only described.
    layers: see `abstract.model_sizes`.

  Raises:
    ValueError: the config cannot be run on the mesh; the message says what must hold.
  """
  base = abstract.base(config, layers)
  settings, replicas = base.settings, mesh.shape[placement.AXIS]
  placement.check(
    settings.groups, settings.group_size, replicas, settings.micro_batches
  )
  optimizer = train_state.make_optimizer(
    train_state.OptimizerSettings(**config.optimizer)
  )
  iteration = iteration_lib.Iteration(
    base.modules, settings, *_on_host(base, mesh), optimizer, replicas
  )
  policy, frozen = abstract.start(base.modules, settings, mesh)
  state = abstract.train_state(policy, optimizer, mesh)
  prompts = abstract.on_mesh(abstract.prompts(settings, settings.groups), mesh)
  arguments = (
    state,
    frozen,
    prompts,
    abstract.on_mesh(jax.ShapeDtypeStruct((), jnp.uint32), mesh),
  )
  shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
  fused = jax.jit(
    programs_lib.fused(iteration, mesh),
    donate_argnums=0,
    out_shardings=(shardings, None, None),
  )
  program = Program(
    mesh, fused, arguments, _held(state, frozen) | {"prompts": prompts}
  )
  stages = count.iteration(
    base.modules,
    settings,
    mesh.shape,
    config.model.remat != "none",
    trains_all=not config.model.lora.rank,
  )
  return Programs(
    {"step": program},
    stages,
    settings.groups * settings.group_size,
    _layers(base),
  )


def evaluation(
  config: ml_collections.ConfigDict,
  mesh: jax.sharding.Mesh,
  layers: int | None = None,
) -> Programs:
  """Returns the draft and the revision of `config.eval.batch_size` images, beside the state of training.

  Takes and raises what `step` does.
  """
  base, e = abstract.base(config, layers), config.eval
  settings = setup.evaluation_settings(config, base.settings)
  evaluator = draw.Evaluator(
    base.modules,
    settings,
    *_on_host(base, mesh),
    mesh,
    e.rounds,
    e.batch_size,
    e.seed,
  )
  policy, frozen = abstract.start(base.modules, settings, mesh)
  optimizer = train_state.make_optimizer(
    train_state.OptimizerSettings(**config.optimizer)
  )
  held = _held(abstract.train_state(policy, optimizer, mesh), frozen)
  many = jax.sharding.NamedSharding(
    mesh, jax.sharding.PartitionSpec(placement.AXIS)
  )
  by_row = lambda tree: abstract.on_mesh(
    tree, mesh, jax.tree.map(lambda _: many, tree)
  )
  rows = by_row(
    (
      abstract.prompts(settings, e.batch_size),
      jax.ShapeDtypeStruct((e.batch_size, 3), jnp.int32),
    )
  )
  arguments = (frozen.whole(policy), frozen.towers, *rows)
  with jax.set_mesh(mesh):
    last = by_row(jax.eval_shape(evaluator.draft, *arguments).standing)
  programs = {
    "draft": Program(mesh, evaluator.draft, arguments, held | {"images": rows}),
    "revise": Program(
      mesh,
      evaluator.revise,
      (*arguments, last),
      held | {"images": (rows, last)},
    ),
  }
  return Programs(
    programs,
    count.rollouts(base.modules, settings, mesh.shape, e.batch_size, 1),
    e.batch_size,
    _layers(base),
  )


def generation(
  config: ml_collections.ConfigDict,
  mesh: jax.sharding.Mesh,
  layers: int | None = None,
  num_images: int = 4,
) -> Programs:
  """Returns the stages of `inference.Model.generate`, for a number of images of one prompt.

  Takes and raises what `step` does.
  """
  base = abstract.base(config, layers)
  stages = inference.make_stages(config, base.modules, base.settings)
  whole = functools.partial(abstract.on_mesh, mesh=mesh)
  policy, frozen = abstract.weights(
    stages.modules, mesh, base.modules.bagel.dtype
  )
  prompts = whole(abstract.prompts(stages.settings, num_images))
  keys = whole(
    jax.eval_shape(
      lambda: keys_lib.numbered_keys(0, jnp.zeros((num_images, 3), jnp.int32))
    )
  )
  programs = {}

  def program(name: str, stage: Callable, *arguments):
    function = jax.jit(functools.partial(stage, stages))
    held = {"parameters": policy, "image towers": frozen, "images": arguments}
    programs[name] = Program(mesh, function, (policy, frozen, *arguments), held)
    with jax.set_mesh(mesh):
      return whole(jax.eval_shape(function, policy, frozen, *arguments))

  thought = program("think", inference.think, prompts, keys)
  images = program("draft", inference.draft, thought, keys)
  source = program("look", inference.look, images)
  program("reflect", inference.reflect, prompts, source, keys)
  number = lambda *shape: jax.ShapeDtypeStruct((num_images, *shape), jnp.int32)
  told = samples_lib.Instruction(
    number(stages.settings.capacities.instruction),
    number(),
    jax.ShapeDtypeStruct((num_images,), bool),
  )
  program("refine", inference.refine, source, whole(told), keys)
  return Programs(
    programs,
    count.rollouts(stages.modules, stages.settings, mesh.shape, num_images, 1),
    num_images,
    _layers(base),
  )


COMMANDS = {"step": step, "evaluate": evaluation, "generate": generation}


def _layers(base: abstract.Base) -> int:
  return base.modules.bagel.config.llm.num_layers


def _on_host(base: abstract.Base, mesh: jax.sharding.Mesh):
  """Returns a reward and a parser that call back to the host."""
  capacity = base.settings.capacities.instruction
  return (
    scorer.reward_from_host(abstract.no_reward, ("strict",), mesh),
    scorer.parse_on_host(base.tokenizer, capacity, mesh),
  )


def _held(
  state: train_state.TrainState, frozen: iteration_lib.Frozen
) -> dict[str, object]:
  return {
    "trained parameters": state.policy,
    "optimizer": state.opt_state,
    "base of adapters": frozen.base,
    "reference": frozen.reference,
    "image towers": frozen.towers,
  }

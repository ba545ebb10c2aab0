"""The fused step of a config as an abstract program on the chips of a topology: no weights, no services."""

from collections.abc import Sequence
import dataclasses
import math

import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from r3jax import experiment as experiment_lib
from r3jax import pretrained as pretrained_lib
from r3jax import types
from r3jax.io import bagel_checkpoint
from r3jax.models import config as config_lib
from r3jax.models import lora as lora_lib
from r3jax.models import policy as policy_lib
from r3jax.models import towers as towers_lib
from r3jax.parallel import rules
from r3jax.rewards import base as rewards_base
from r3jax.rewards import host
from r3jax.rl import placement
from r3jax.rl import rollout as rollout_lib
from r3jax.rl import settings as settings_lib
from r3jax.rl import state as state_lib
from r3jax.rl import step as step_lib

CHARACTERS = 4  # of a token, where there is no tokenizer to count with


@dataclasses.dataclass(frozen=True)
class StandIn:
  """Counts tokens where there is no tokenizer: one for every four characters."""

  special_ids: config_lib.SpecialIds

  def encode(self, text: str) -> list[int]:
    """Returns as many ids as the text may have tokens."""
    return [0] * math.ceil(len(text) / CHARACTERS)

  def decode(self, ids: Sequence[int]) -> str:
    """Returns no text."""
    del ids
    return ""


def _no_reward(images: np.ndarray, rows) -> rewards_base.Score:
  """Stands for a reward that Python computes."""
  del rows
  return rewards_base.to_score([rewards_base.Failed("compiled only")] * len(images), ("strict",))


@dataclasses.dataclass(frozen=True)
class Program:
  """The step and what it is compiled for.

  Attributes:
    modules, settings: of the config.
    mesh: of the topology's chips.
    arguments: (state, frozen, prompts, seed), shapes with shardings.
    function: of the arguments; consumes the state.
  """

  modules: settings_lib.Modules
  settings: settings_lib.Settings
  mesh: jax.sharding.Mesh
  arguments: tuple
  function: object

  def lower(self):
    """Traces the step for the topology."""
    with jax.set_mesh(self.mesh):
      return self.function.lower(*self.arguments)

  def bytes_by_kind(self) -> dict[str, int]:
    """Returns the bytes that one chip holds of every kind of argument."""
    state, frozen, prompts, _ = self.arguments
    kinds = {
        "trained parameters": state.policy, "optimizer": state.opt_state, "base of adapters": frozen.base,
        "reference": frozen.reference, "image towers": frozen.towers, "prompts": prompts,
    }
    return {name: sum(_chip_bytes(leaf) for leaf in jax.tree.leaves(tree)) for name, tree in kinds.items()}


def _chip_bytes(leaf: jax.ShapeDtypeStruct) -> int:
  return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def model_sizes(config: ml_collections.ConfigDict, layers: int | None) -> config_lib.BagelConfig:
  """Returns the sizes of the config's model, those of BAGEL-7B-MoT where it names no folder.

  Args:
    config: of a run.
    layers: of the language model, in place of all.
  """
  sizes = pretrained_lib.find(config.model.folder).sizes if config.model.folder else config_lib.bagel_7b()
  if layers is None:
    return sizes
  return dataclasses.replace(sizes, llm=dataclasses.replace(sizes.llm, num_layers=layers))


def step(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh, layers: int | None = None) -> Program:
  """Returns the fused step of a config, with a reward and a text parser on the host.

  Args:
    config: see `configs/r3_geneval.py`; `model.attention` is not "auto".
    mesh: of chips, which may be only described.
    layers: see `model_sizes`.

  Raises:
    ValueError: the config cannot be run on the mesh; the message says what must hold.
  """
  sizes = model_sizes(config, layers)
  dtype = experiment_lib.DTYPES[config.model.dtype]
  towers = towers_lib.Towers(sizes, (config.image.height, config.image.width), dtype)
  tokenizer = StandIn(sizes.special_ids)
  modules = experiment_lib.make_modules(config, sizes, towers)
  settings = experiment_lib.make_settings(config, tokenizer, towers)
  replicas = mesh.shape[placement.AXIS]
  placement.check(settings.groups, settings.group_size, replicas, settings.micro_batches)
  optimizer = state_lib.make_optimizer(state_lib.OptimizerSettings(**config.optimizer))
  iteration = step_lib.Iteration(
      modules, settings, host.reward_from_host(_no_reward, ("strict",), mesh),
      host.parse_on_host(tokenizer, settings.capacities.instruction, mesh), optimizer, replicas,
  )
  state, frozen = _parameters(modules, settings, optimizer, mesh)
  arguments = (state, frozen, _prompts(settings, mesh), _placed(jax.ShapeDtypeStruct((), jnp.uint32), mesh))
  shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
  fused = jax.jit(step_lib.fused(iteration, mesh), donate_argnums=0, out_shardings=(shardings, None, None))
  return Program(modules, settings, mesh, arguments, fused)


def _placed(tree, mesh: jax.sharding.Mesh, shardings=None):
  """Returns shapes with shardings; replicated where none are given."""
  shardings = shardings or jax.tree.map(lambda _: rules.replicated(mesh), tree)
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def _narrowed(tree: types.Params, dtype: types.DType) -> types.Params:
  """Narrows shapes as `policy.narrowed` does arrays."""
  found = jax.eval_shape(lambda params: policy_lib.narrowed(params, dtype), tree)
  return jax.tree.map(lambda x, like: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=like.sharding), found, tree)


def _parameters(modules: settings_lib.Modules, settings: settings_lib.Settings, optimizer, mesh):
  """Returns the abstract state and frozen parameters, as `Experiment.start` and `Session.init` make them."""
  bagel = modules.bagel
  shardings = pretrained_lib.shardings(bagel.clone(lora=lora_lib.LoRA()), mesh)
  shapes = bagel_checkpoint.leaf_shapes(bagel.config)
  wide = jnp.promote_types(bagel.dtype, jnp.float32)
  leaves = {path: jax.ShapeDtypeStruct(tuple(shapes[path]), wide, sharding=shardings[path]) for path in shapes}
  tree = flax.traverse_util.unflatten_dict(leaves, sep="/")
  policy, towers = tree.pop("policy"), _narrowed(tree, bagel.dtype)
  reference = _narrowed(policy, bagel.dtype) if settings.loss.needs_reference else None
  base = None
  if bagel.lora.rank:
    base, reference = _narrowed(policy, bagel.dtype), {} if settings.loss.needs_reference else None
    adapters = lora_lib.adapters(policy_lib.shardings(bagel, mesh))
    policy = _placed(lora_lib.adapters(policy_lib.unboxed(bagel)), mesh, adapters)
  moments = jax.eval_shape(optimizer.init, policy)
  placed = rules.like_parameters(moments, jax.tree.map(lambda leaf: leaf.sharding, policy), mesh)
  count = _placed(jax.ShapeDtypeStruct((), jnp.int32), mesh)
  return (
      state_lib.TrainState(policy, _placed(moments, mesh, placed), count),
      step_lib.Frozen(towers, reference, base),
  )


def _prompts(settings: settings_lib.Settings, mesh: jax.sharding.Mesh) -> rollout_lib.Prompts:
  c, groups = settings.capacities, settings.groups
  number = lambda *shape: jax.ShapeDtypeStruct((groups, *shape), jnp.int32)
  return _placed(
      rollout_lib.Prompts(number(c.prompt), number(), number(c.question), number(), number(), number()), mesh
  )

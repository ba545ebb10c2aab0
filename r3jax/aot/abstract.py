"""What a run computes with, as shapes on the chips of a topology: no weights, no services."""

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


def no_reward(images: np.ndarray, rows) -> rewards_base.Score:
  """Stands for a reward that Python computes."""
  del rows
  return rewards_base.to_score([rewards_base.Failed("compiled only")] * len(images), ("strict",))


@dataclasses.dataclass(frozen=True)
class Base:
  """A config's model and how it samples, without weights.

  Attributes:
    tokenizer: counts.
    modules, settings: as of `experiment.Base`.
  """

  tokenizer: StandIn
  modules: settings_lib.Modules
  settings: settings_lib.Settings


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


def base(config: ml_collections.ConfigDict, layers: int | None) -> Base:
  """Returns what a config says of the model and its sampling.

  Args:
    config: of a run; `model.attention` is not "auto".
    layers: see `model_sizes`.

  Raises:
    ValueError: the config cannot be run; the message says what must hold.
  """
  sizes = model_sizes(config, layers)
  towers = towers_lib.Towers(sizes, (config.image.height, config.image.width), experiment_lib.DTYPES[config.model.dtype])
  tokenizer = StandIn(sizes.special_ids)
  modules = experiment_lib.make_modules(config, sizes, towers)
  return Base(tokenizer, modules, experiment_lib.make_settings(config, tokenizer, towers))


def on_mesh(tree, mesh: jax.sharding.Mesh, shardings=None):
  """Returns shapes with shardings; replicated where none are given."""
  shardings = shardings or jax.tree.map(lambda _: rules.replicated(mesh), tree)
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def chip_bytes(tree) -> int:
  """Returns the bytes of shapes with shardings that one chip holds."""
  size = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
  return sum(size(leaf) for leaf in jax.tree.leaves(tree))


def narrowed(tree: types.Params, dtype: types.DType) -> types.Params:
  """Narrows shapes as `policy.narrowed` does arrays."""
  found = jax.eval_shape(lambda params: policy_lib.narrowed(params, dtype), tree)
  return jax.tree.map(lambda x, like: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=like.sharding), found, tree)


def weights(modules: settings_lib.Modules, mesh: jax.sharding.Mesh, dtype: types.DType) -> tuple[types.Params, types.Params]:
  """Returns the policy, without adapters, and the towers, as `Pretrained.load` makes them."""
  plain = modules.bagel.clone(lora=lora_lib.LoRA())
  shardings, shapes = pretrained_lib.shardings(plain, mesh), bagel_checkpoint.leaf_shapes(plain.config)
  leaves = {path: jax.ShapeDtypeStruct(tuple(shapes[path]), dtype, sharding=shardings[path]) for path in shapes}
  tree = flax.traverse_util.unflatten_dict(leaves, sep="/")
  return tree.pop("policy"), tree


def start(modules: settings_lib.Modules, settings: settings_lib.Settings, mesh: jax.sharding.Mesh):
  """Returns what training changes and what it reads, see `Experiment.start`."""
  bagel = modules.bagel
  policy, towers = weights(modules, mesh, jnp.promote_types(bagel.dtype, jnp.float32))
  towers, narrow = narrowed(towers, bagel.dtype), narrowed(policy, bagel.dtype)
  if not bagel.lora.rank:
    return policy, step_lib.Frozen(towers, narrow if settings.loss.needs_reference else None)
  shardings = lora_lib.adapters(policy_lib.shardings(bagel, mesh))
  adapters = on_mesh(lora_lib.adapters(policy_lib.unboxed(bagel)), mesh, shardings)
  return adapters, step_lib.Frozen(towers, {} if settings.loss.needs_reference else None, narrow)


def train_state(policy: types.Params, optimizer, mesh: jax.sharding.Mesh) -> state_lib.TrainState:
  """Returns the state at which `Session.init` starts."""
  moments = jax.eval_shape(optimizer.init, policy)
  placed = rules.like_parameters(moments, jax.tree.map(lambda leaf: leaf.sharding, policy), mesh)
  count = on_mesh(jax.ShapeDtypeStruct((), jnp.int32), mesh)
  return state_lib.TrainState(policy, on_mesh(moments, mesh, placed), count)


def prompts(settings: settings_lib.Settings, rows: int) -> rollout_lib.Prompts:
  """Returns the shapes of prompts."""
  number = lambda *shape: jax.ShapeDtypeStruct((rows, *shape), jnp.int32)
  c = settings.capacities
  return rollout_lib.Prompts(number(c.prompt), number(), number(c.question), number(), number(), number())

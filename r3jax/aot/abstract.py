"""What a run computes with, as shapes on the chips of a topology: no weights, no services."""

from collections.abc import Sequence
import dataclasses
import math

import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from r3jax import types
from r3jax.agent import samples
from r3jax.agent import settings as settings_lib
from r3jax.checkpoint import bagel_files
from r3jax.checkpoint import pretrained
from r3jax.model import architecture
from r3jax.model import image_encoders
from r3jax.model import low_rank
from r3jax.model import parameters
from r3jax.parallel import sharding
from r3jax.rewards import outcome
from r3jax.rl import iteration
from r3jax.rl import train_state as train_state_lib
from r3jax.run import setup
from r3jax.sequence import protocol

CHARACTERS = 4  # of a token, where there is no tokenizer to count with


@dataclasses.dataclass(frozen=True)
class StandIn:
  """Counts tokens where there is no tokenizer: one for every four characters."""

  special_ids: protocol.SpecialIds

  def encode(self, text: str) -> list[int]:
    """Returns as many ids as the text may have tokens."""
    return [0] * math.ceil(len(text) / CHARACTERS)

  def decode(self, ids: Sequence[int]) -> str:
    """Returns no text."""
    del ids
    return ""


def no_reward(images: np.ndarray, rows) -> types.Score:
  """Stands for a reward that Python computes."""
  del rows
  return outcome.to_score(
    [outcome.Failed("compiled only")] * len(images), ("strict",)
  )


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


def model_sizes(
  config: ml_collections.ConfigDict, layers: int | None
) -> architecture.BagelConfig:
  """Returns the sizes of the config's model, those of BAGEL-7B-MoT where it names no folder.

  Args:
    config: of a run.
    layers: of the language model, in place of all.
  """
  sizes = (
    pretrained.find(config.model.folder, config.world).sizes
    if config.model.folder
    else architecture.bagel_7b()
  )
  if layers is None:
    return sizes
  return dataclasses.replace(
    sizes, llm=dataclasses.replace(sizes.llm, num_layers=layers)
  )


def base(config: ml_collections.ConfigDict, layers: int | None) -> Base:
  """Returns what a config says of the model and its sampling.

  Args:
    config: of a run; `model.attention` is not "auto".
    layers: see `model_sizes`.

  Raises:
    ValueError: the config cannot be run; the message says what must hold.
  """
  sizes = model_sizes(config, layers)
  towers = image_encoders.Towers(
    sizes,
    (config.image.height, config.image.width),
    setup.DTYPES[config.model.dtype],
  )
  tokenizer = StandIn(sizes.special_ids)
  modules = setup.make_modules(config, sizes, towers)
  return Base(
    tokenizer, modules, setup.make_settings(config, tokenizer, towers)
  )


def on_mesh(tree, mesh: jax.sharding.Mesh, shardings=None):
  """Returns shapes with shardings; replicated where none are given."""
  shardings = shardings or jax.tree.map(
    lambda _: sharding.replicated(mesh), tree
  )
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    tree,
    shardings,
  )


def chip_bytes(tree) -> int:
  """Returns the bytes of shapes with shardings that one chip holds."""
  size = lambda leaf: (
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
  )
  return sum(size(leaf) for leaf in jax.tree.leaves(tree))


def narrowed(tree: types.Params, dtype: types.DType) -> types.Params:
  """Narrows shapes as `policy.narrowed` does arrays."""
  found = jax.eval_shape(
    lambda params: parameters.narrowed(params, dtype), tree
  )
  return jax.tree.map(
    lambda x, like: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=like.sharding
    ),
    found,
    tree,
  )


def weights(
  modules: settings_lib.Modules, mesh: jax.sharding.Mesh, dtype: types.DType
) -> tuple[types.Params, types.Params]:
  """Returns the policy, without adapters, and the towers, as `Pretrained.load` makes them."""
  plain = modules.bagel.clone(lora=low_rank.LoRA())
  shardings, shapes = (
    pretrained.shardings(plain, mesh),
    bagel_files.leaf_shapes(plain.config),
  )
  leaves = {
    path: jax.ShapeDtypeStruct(
      tuple(shapes[path]), dtype, sharding=shardings[path]
    )
    for path in shapes
  }
  tree = flax.traverse_util.unflatten_dict(leaves, sep="/")
  return tree.pop("policy"), tree


def start(
  modules: settings_lib.Modules,
  settings: settings_lib.Settings,
  mesh: jax.sharding.Mesh,
):
  """Returns what training changes and what it reads, see `Experiment.start`."""
  bagel = modules.bagel
  policy, towers = weights(
    modules, mesh, jnp.promote_types(bagel.dtype, jnp.float32)
  )
  towers, narrow = narrowed(towers, bagel.dtype), narrowed(policy, bagel.dtype)
  if not bagel.lora.rank:
    return policy, iteration.Frozen(
      towers, narrow if settings.loss.needs_reference else None
    )
  shardings = low_rank.adapters(parameters.shardings(bagel, mesh))
  adapters = on_mesh(
    low_rank.adapters(parameters.unboxed(bagel)), mesh, shardings
  )
  return adapters, iteration.Frozen(
    towers, {} if settings.loss.needs_reference else None, narrow
  )


def train_state(
  policy: types.Params, optimizer, mesh: jax.sharding.Mesh
) -> train_state_lib.TrainState:
  """Returns the state at which `Session.init` starts."""
  moments = jax.eval_shape(optimizer.init, policy)
  placed = sharding.like_parameters(
    moments, jax.tree.map(lambda leaf: leaf.sharding, policy), mesh
  )
  count = on_mesh(jax.ShapeDtypeStruct((), jnp.int32), mesh)
  return train_state_lib.TrainState(
    policy, on_mesh(moments, mesh, placed), count
  )


def prompts(settings: settings_lib.Settings, rows: int) -> samples.Prompts:
  """Returns the shapes of prompts."""
  number = lambda *shape: jax.ShapeDtypeStruct((rows, *shape), jnp.int32)
  c = settings.capacities
  return samples.Prompts(
    number(c.prompt), number(), number(c.question), number(), number(), number()
  )

"""The arrays of a run as shapes on the chips of a topology: no weights, no services."""

from collections.abc import Sequence
import dataclasses
import math

import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from r3jax import types
from r3jax.agent import actors
from r3jax.agent import experience
from r3jax.agent import rollout_settings
from r3jax.checkpoint import bagel_files
from r3jax.checkpoint import pretrained
from r3jax.model import architecture
from r3jax.model import image_encoders
from r3jax.model import low_rank
from r3jax.model import parameters
from r3jax.parallel import sharding
from r3jax.rewards import outcome
from r3jax.rl import iteration_settings
from r3jax.rl import train_state
from r3jax.run import model_setup
from r3jax.run import stage_settings
from r3jax.sequence import protocol

# Of English text, where there is no tokenizer to count with.
CHARACTERS_PER_TOKEN = 4


@dataclasses.dataclass(frozen=True)
class TokenCounter:
  """Stands for a tokenizer: a text has a token for every four characters."""

  special_ids: protocol.SpecialIds

  def encode(self, text: str) -> list[int]:
    """Returns as many ids as the text may have tokens."""
    return [0] * math.ceil(len(text) / CHARACTERS_PER_TOKEN)

  def decode(self, ids: Sequence[int]) -> str:
    """Returns no text."""
    del ids
    return ""


def no_reward(images: np.ndarray, rows: np.ndarray) -> types.Score:
  """Stands for a reward that the host computes."""
  del rows
  failure = outcome.Failed("compiled only")
  return outcome.to_score([failure] * len(images), ("strict",))


@dataclasses.dataclass(frozen=True)
class Base:
  """The model of a config and how it samples, without weights.

  Attributes:
    tokenizer: counts tokens.
    modules: of the model.
    rollout: how it samples.
    settings: how it learns.
  """

  tokenizer: TokenCounter
  modules: actors.Modules
  rollout: rollout_settings.RolloutSettings
  settings: iteration_settings.IterationSettings


def model_sizes(
  config: ml_collections.ConfigDict, layers: int | None
) -> architecture.BagelConfig:
  """Returns the sizes of the config's model, those of BAGEL-7B-MoT where it names no folder.

  Args:
    config: of a run.
    layers: number of layers of the language model, in place of its own; None keeps it.
  """
  if config.model.folder:
    sizes = pretrained.find(config.model.folder, config.world).sizes
  else:
    sizes = architecture.bagel_7b()
  if layers is None:
    return sizes
  llm = dataclasses.replace(sizes.llm, num_layers=layers)
  return dataclasses.replace(sizes, llm=llm)


def base(config: ml_collections.ConfigDict, layers: int | None) -> Base:
  """Returns what a config says of the model and its sampling.

  Args:
    config: of a run; `model.attention` is not "auto".
    layers: see `model_sizes`.

  Raises:
    ValueError: the config cannot run; the message says what must hold.
  """
  sizes = model_sizes(config, layers)
  image_size = (config.image.height, config.image.width)
  dtype = model_setup.DTYPES[config.model.dtype]
  towers = image_encoders.Towers(sizes, image_size, dtype)
  tokenizer = TokenCounter(sizes.special_ids)
  modules = model_setup.make_modules(config, sizes, towers)
  rollout = stage_settings.for_rollouts(config, tokenizer, towers)
  settings = stage_settings.for_iteration(config)
  return Base(tokenizer, modules, rollout, settings)


def on_mesh(tree, mesh: jax.sharding.Mesh, shardings=None):
  """Returns shapes with shardings.

  Args:
    tree: shapes.
    mesh: of chips.
    shardings: a tree like it; None replicates everything.
  """
  if shardings is None:
    shardings = jax.tree.map(lambda _: sharding.replicated(mesh), tree)

  def place(leaf, leaf_sharding):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf_sharding)

  return jax.tree.map(place, tree, shardings)


def chip_bytes(tree) -> int:
  """Returns the bytes that one chip holds of shapes with shardings."""
  total = 0
  for leaf in jax.tree.leaves(tree):
    shard = leaf.sharding.shard_shape(leaf.shape)
    total += math.prod(shard) * leaf.dtype.itemsize
  return total


def narrowed(tree: types.Params, dtype: types.DType) -> types.Params:
  """Returns what `parameters.narrowed` makes of parameters, with the same shardings."""

  def narrow(params):
    return parameters.narrowed(params, dtype)

  shapes = jax.eval_shape(narrow, tree)

  def place(leaf, like):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=like.sharding)

  return jax.tree.map(place, shapes, tree)


def weights(
  modules: actors.Modules, mesh: jax.sharding.Mesh, dtype: types.DType
) -> tuple[types.Params, types.Params]:
  """Returns the policy without adapters, and the towers, as `Pretrained.load` makes them."""
  plain = modules.bagel.clone(lora=low_rank.LoRA())
  shardings = pretrained.shardings(plain, mesh)
  leaves = {}
  for path, shape in bagel_files.leaf_shapes(plain.config).items():
    leaves[path] = jax.ShapeDtypeStruct(
      tuple(shape), dtype, sharding=shardings[path]
    )
  tree = flax.traverse_util.unflatten_dict(leaves, sep="/")
  policy = tree.pop("policy")
  return policy, tree


def start(
  modules: actors.Modules,
  loss: iteration_settings.LossSettings,
  mesh: jax.sharding.Mesh,
  freeze_und: bool,
) -> tuple[types.Params, train_state.Frozen]:
  """Returns what training changes, and what it only reads, as `Experiment.start` does."""
  bagel = modules.bagel
  trained_dtype = jnp.promote_types(bagel.dtype, jnp.float32)
  policy, towers = weights(modules, mesh, trained_dtype)
  towers = narrowed(towers, bagel.dtype)
  needs_reference = loss.needs_reference
  if not bagel.lora.rank:
    base = None
    if freeze_und:
      und, policy = parameters.split_experts(policy)
      base = narrowed(und, bagel.dtype)
    reference = narrowed(policy, bagel.dtype) if needs_reference else None
    return policy, train_state.Frozen(towers, reference, base)
  # The reference has the base alone: all adapters removed.
  reference = {} if needs_reference else None
  shapes = low_rank.adapters(parameters.unboxed(bagel))
  shardings = low_rank.adapters(parameters.shardings(bagel, mesh))
  adapters = on_mesh(shapes, mesh, shardings)
  base = narrowed(policy, bagel.dtype)
  return adapters, train_state.Frozen(towers, reference, base)


def initial_state(
  policy: types.Params,
  optimizer: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
) -> train_state.TrainState:
  """Returns the state at the start of a run."""
  moments = jax.eval_shape(optimizer.init, policy)
  policy_shardings = jax.tree.map(lambda leaf: leaf.sharding, policy)
  shardings = sharding.like_parameters(moments, policy_shardings, mesh)
  step = on_mesh(jax.ShapeDtypeStruct((), jnp.int32), mesh)
  return train_state.TrainState(policy, on_mesh(moments, mesh, shardings), step)


def prompts(
  settings: rollout_settings.RolloutSettings, rows: int
) -> experience.Prompts:
  """Returns the shapes of a number of prompts."""

  def integers(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows, *shape), jnp.int32)

  capacities = settings.capacities
  return experience.Prompts(
    integers(capacities.prompt),
    integers(),
    integers(capacities.question),
    integers(),
    integers(),
    integers(),
  )

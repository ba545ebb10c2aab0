"""Finds worlds by name."""

from r3jax import plugins
from r3jax.worlds import base

# In a config's `data.train`, `data.heldout`, `reward.name` and `model.folder` this means: that of
# `config.world`.
OF_WORLD = "world"

# name -> module:attribute
REGISTERED = {"shapes": "r3jax.worlds.shapes.world:WORLD"}


def find(name: str) -> base.World:
  """Returns the world of a name.

  Args:
    name: one of REGISTERED, or `package.module:ATTRIBUTE` of an importable module.

  Raises:
    ValueError: there is no such world; the message says what is missing.
  """
  path = REGISTERED.get(name, name)
  if not plugins.is_path(path):
    raise ValueError(
      f"world must be one of {sorted(REGISTERED)} or 'package.module:ATTRIBUTE'; got {name!r}"
    )
  world = plugins.load(path, "world")
  if not isinstance(world, base.World):
    raise ValueError(
      f"world must name a `r3jax.worlds.base.World`; {name!r} is a {type(world).__name__}"
    )
  return world


def find_if_named(name: str) -> base.World | None:
  """Returns the world of a name, None where the name is empty.

  Raises:
    ValueError: see `find`.
  """
  return find(name) if name else None


def needed(world: base.World | None, key: str) -> base.World:
  """Returns a config's world, which one of its keys refers to.

  Args:
    world: that of `config.world`.
    key: the dotted key whose value is OF_WORLD, for the message.

  Raises:
    ValueError: the config names no world.
  """
  if world is None:
    raise ValueError(
      f"{key} is {OF_WORLD!r}, so config.world must name a world, one of {sorted(REGISTERED)} "
      "or 'package.module:ATTRIBUTE'; it is empty"
    )
  return world

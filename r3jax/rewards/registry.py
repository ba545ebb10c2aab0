"""From the config's `reward` section to a reward. Everything is checked here, services included."""

import dataclasses

import ml_collections

from r3jax.rewards import combine
from r3jax.rewards.from_host import cache
from r3jax.rewards.from_host import scorer
from r3jax.rewards.remote import client as client_lib
from r3jax.rewards.remote import judge
from r3jax.rewards.remote import services
from r3jax.worlds import base as worlds_base
from r3jax.worlds import registry as worlds_registry

# not a member's
_OF_THE_RUN = ("shuffle", "max_failed_fraction", "failure_window")
_SERVICES = ("service", "flow_grpo", "unirl", "judge")


def build(
  section: ml_collections.ConfigDict, world: worlds_base.World | None = None
) -> combine.GraphReward:
  """Returns the reward that a section describes; asks its services whether they are there.

  Args:
    section: the config's `reward`.
    world: that of the config, if it names one.

  Raises:
    ValueError: the section cannot be used, or no service answers.
  """
  return combine.trained_by(_member(section, world), section.value)


def _member(section, world) -> combine.GraphReward:
  """Returns the reward before `value` picks the trained part."""
  if section.name == worlds_registry.OF_WORLD:
    return combine.of_world(worlds_registry.needed(world, "reward.name"))
  if section.name == "sum":
    return combine.weighted_sum(
      {
        name: _weighted(section, name, changes, world)
        for name, changes in section.members.items()
      }
    )
  if section.name in _SERVICES:
    reward = _host_reward(section)
    if section.cache:
      reward = cache.Cached(reward, section.cache)
    return combine.on_host(section.name, scorer.Scorer(reward))
  known = [worlds_registry.OF_WORLD, "sum", *_SERVICES]
  raise ValueError(f"reward.name must be one of {known}; got {section.name!r}")


def _weighted(
  section, name: str, member, world
) -> tuple[float, combine.GraphReward]:
  """Returns weight and reward of a member: the section with the member's changes."""
  changes = {key: member[key] for key in member if key != "weight"}
  if "name" not in changes or "weight" not in member:
    raise ValueError(
      f"reward.members.{name} must have a name and a weight; got {sorted(member)}"
    )
  unknown = sorted(
    set(changes) - set(section) | set(changes) & set(_OF_THE_RUN)
  )
  if unknown:
    raise ValueError(
      f"reward.members.{name} has keys that reward does not have: {unknown}"
    )
  inner = ml_collections.ConfigDict(
    section.to_dict() | {"members": {}, "value": "score"}
  )
  inner.update(changes)
  return member["weight"], build(inner, world)


def _host_reward(section):
  unknown = sorted(
    set(section.client)
    - {field.name for field in dataclasses.fields(client_lib.Settings)}
  )
  if unknown:
    raise ValueError(
      f"reward.client has keys that a client does not have: {unknown}"
    )
  client = client_lib.Client(
    client_lib.Settings(
      endpoints=tuple(section.endpoints),
      token_env=section.token_env,
      **section.client,
    )
  )
  if section.name == "service":
    return services.JsonService(client, section.batch, section.image_format)
  if section.name == "unirl":
    return services.UniRlService(client, section.batch)
  if section.name == "flow_grpo":
    return services.FlowGrpoService(client, section.batch)
  return judge.Judge(client, judge.Settings(**section.judge))

"""Builds the reward of the config's section `reward`, and checks it, its services included."""

from collections.abc import Callable
import dataclasses

import ml_collections

from r3jax import plugins
from r3jax.rewards import combine
from r3jax.rewards import outcome
from r3jax.rewards.from_host import cache
from r3jax.rewards.from_host import scorer
from r3jax.rewards.from_host import user_function
from r3jax.rewards.remote import http_client
from r3jax.rewards.remote import judge
from r3jax.rewards.remote import services
from r3jax.rewards.remote import unirl
from r3jax.worlds import base
from r3jax.worlds import registry as worlds

# Keys that belong to the run as a whole, so that a member of a sum cannot set them.
_RUN_KEYS = ("shuffle", "max_failed_fraction", "failure_window")


@dataclasses.dataclass(frozen=True)
class _Source:
  """What a reward is built from.

  Attributes:
    section: the config's `reward`, or that of a member of a sum.
    world: the config's world, if it names one.
    image_size: height and width of the run's images.
    evaluates: whether the reward is for evaluations.
  """

  section: ml_collections.ConfigDict
  world: base.World | None
  image_size: tuple[int, int]
  evaluates: bool


def build(
  section: ml_collections.ConfigDict,
  world: base.World | None = None,
  image_size: tuple[int, int] = (512, 512),
  evaluates: bool = False,
) -> combine.GraphReward:
  """Returns the reward that a section describes; asks its services whether they answer.

  Args:
    section: the config's `reward`; its `name` is one of BUILDERS, or `package.module:function`.
    world: the config's world, if it names one.
    image_size: height and width of the run's images, with which a judge or a user's function is
      tried.
    evaluates: whether the reward is for evaluations: judges may have wordings of their own there.

  Raises:
    ValueError: the section cannot be used, or no service answers.
  """
  return _build(_Source(section, world, image_size, evaluates))


def differs_in_evaluation(section: ml_collections.ConfigDict) -> bool:
  """Returns whether a judge of a section has wordings of its own for evaluations."""
  settings = section.get("judge", {})
  if settings.get("eval_prompt_file") or settings.get("eval_system_file"):
    return True
  # Members are sections too, with only the keys that they change.
  members = section.get("members", {})
  return any(map(differs_in_evaluation, members.values()))


def _build(source: _Source) -> combine.GraphReward:
  name = source.section.name
  if name in BUILDERS:
    reward = BUILDERS[name](source)
  elif plugins.is_path(name):
    reward = _user_function(source)
  else:
    raise ValueError(
      f"reward.name must be one of {list(BUILDERS)} or 'package.module:function'; got {name!r}"
    )
  reward = combine.lowered_by_clutter(reward, source.section.clutter_weight)
  return combine.trained_by(reward, source.section.value)


def _world(source: _Source) -> combine.GraphReward:
  """Builds the verifier of the config's world."""
  return combine.of_world(worlds.needed(source.world, "reward.name"))


def _sum(source: _Source) -> combine.GraphReward:
  """Builds a weighted sum of members."""
  members = {}
  for name, changes in source.section.members.items():
    members[name] = _member(source, name, changes)
  return combine.weighted_sum(members)


def _member(
  source: _Source, name: str, changes: ml_collections.ConfigDict
) -> combine.Weighted:
  """Builds a member of a sum: the section with the member's changes.

  Raises:
    ValueError: the name or the weight is missing, or a key is unknown.
  """
  if "name" not in changes or "weight" not in changes:
    raise ValueError(
      f"reward.members.{name} must have a name and a weight; got {sorted(changes)}"
    )
  keys = set(changes) - {"weight"}
  unknown = keys - set(source.section) | keys & set(_RUN_KEYS)
  if unknown:
    raise ValueError(
      f"reward.members.{name} has keys that reward does not have: {sorted(unknown)}"
    )
  # A member takes the section's other keys, for example its endpoints.
  own = {"members": {}, "value": "score", "clutter_weight": 0.0}
  section = source.section.to_dict() | own
  member_section = ml_collections.ConfigDict(section)
  member_section.update({key: changes[key] for key in keys})
  member_source = dataclasses.replace(source, section=member_section)
  return combine.Weighted(changes["weight"], _build(member_source))


def _service(source: _Source) -> combine.GraphReward:
  """Builds the reward of a service of r3jax's JSON protocol."""
  section = source.section
  reward = services.JsonService(
    _client(section), section.batch, section.image_format, source.image_size
  )
  return _on_host(source, reward, section.name)


def _judge(source: _Source) -> combine.GraphReward:
  """Builds the reward of a vision-language model as judge."""
  settings = judge.JudgeSettings(**source.section.judge)
  if source.evaluates:
    settings = settings.for_evaluation()
  client = _client(source.section)
  reward = judge.Judge(client, settings, source.image_size)
  return _on_host(source, reward, source.section.name)


def _flow_grpo(source: _Source) -> combine.GraphReward:
  """Builds the reward of Flow-GRPO's GenEval server."""
  section = source.section
  reward = services.FlowGrpoService(_client(section), section.batch)
  return _on_host(source, reward, section.name)


def _unirl(source: _Source) -> combine.GraphReward:
  """Builds a reward of a UniRL service."""
  section = source.section
  settings = unirl.UniRlSettings(
    section.unirl.reward, section.unirl.number, tuple(section.unirl.range)
  )
  reward = unirl.UniRlService(
    _client(section),
    section.batch,
    section.image_format,
    settings,
    source.image_size,
  )
  return _on_host(source, reward, section.name)


def _user_function(source: _Source) -> combine.GraphReward:
  """Builds the reward of a user's Python function."""
  reward = user_function.UserFunction(source.section.name, source.image_size)
  return _on_host(source, reward, reward.name)


def _on_host(
  source: _Source, reward: outcome.HostReward, name: str
) -> combine.GraphReward:
  """Returns a host reward, cached if the section says so, as a reward of the step."""
  if source.section.cache:
    reward = cache.Cached(reward, source.section.cache)
  return combine.on_host(name, scorer.Scorer(reward))


def _client(section: ml_collections.ConfigDict) -> http_client.Client:
  """Returns the client of a section.

  Raises:
    ValueError: a key or a value of it cannot be used.
  """
  fields = {
    field.name for field in dataclasses.fields(http_client.ClientSettings)
  }
  unknown = set(section.client) - fields
  if unknown:
    raise ValueError(
      f"reward.client has keys that a client does not have: {sorted(unknown)}"
    )
  settings = http_client.ClientSettings(
    endpoints=tuple(section.endpoints),
    token_env=section.token_env,
    **section.client,
  )
  return http_client.Client(settings)


# reward.name -> builds the reward; everything else must be `package.module:function`.
BUILDERS: dict[str, Callable[[_Source], combine.GraphReward]] = {
  "world": _world,
  "sum": _sum,
  "service": _service,
  "judge": _judge,
  "flow_grpo": _flow_grpo,
  "unirl": _unirl,
}

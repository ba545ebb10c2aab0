"""Settings of clients and judges with the defaults of the configs."""

from configs import r3_geneval
from r3jax.rewards.remote import http_client
from r3jax.rewards.remote import judge as judge_lib


def client(**changes) -> http_client.ClientSettings:
  """Returns the config's `reward.client` with changes."""
  section = r3_geneval.get_config().reward.client.to_dict()
  return http_client.ClientSettings(**{"token_env": ""} | section | changes)


def judge(**changes) -> judge_lib.JudgeSettings:
  """Returns the config's `reward.judge` with changes."""
  section = r3_geneval.get_config().reward.judge.to_dict()
  return judge_lib.JudgeSettings(**section | changes)

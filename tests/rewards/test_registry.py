"""Tests of rewards/registry.py, and that the configs of the benchmarks say what it reads."""

import json

import jax
import numpy as np
import pytest

from configs import r3_geneval
from configs import r3_geneval_plus
from configs import r3_ocr
from configs import r3_tiif
from r3jax.rewards import registry
from r3jax.rewards.from_host import cache
from r3jax.rewards.remote import http_client
from r3jax.rewards.remote import judge
from r3jax.rewards.remote import protocol
from r3jax.worlds.shapes import prompts
from r3jax.worlds.shapes import scenes
from r3jax.worlds.shapes import verifier
from r3jax.worlds.shapes import world
from tests.rewards import scripted

HEALTH = json.dumps(
  {
    "protocol": 1,
    "status": "ready",
    "parts": ["strict"],
    "reward": {"model": "m"},
  }
).encode()


def section(**changes):
  config = r3_geneval.get_config().unlock().reward
  config.update(changes)
  return config


def answer(request):
  return (200, HEALTH) if request.path == protocol.HEALTH_PATH else (500, b"")


def chat(request):
  """Answers as a judge that calls everything right."""
  if request.method == "GET":
    return 200, b'{"data": [{"id": "m"}]}'
  message = {"content": '{"correct": 1}'}
  return 200, json.dumps({"choices": [{"message": message}]}).encode()


class TestBuild:
  def test_service_is_cached_and_described(self):
    with scripted.serve(answer) as server:
      reward = registry.build(section(name="service", endpoints=(server.url,)))
      assert reward.describe() == {"service": {"service": "json", "model": "m"}}
      assert isinstance(reward.scorers["service"]._reward, cache.Cached)
      uncached = registry.build(
        section(name="service", endpoints=(server.url,), cache=0)
      )
      assert not isinstance(uncached.scorers["service"]._reward, cache.Cached)

  def test_sum_of_verifier_and_service(self):
    members = {
      "eye": {"name": "world", "weight": 1.0},
      "net": {"name": "service", "weight": 3.0, "batch": 2},
    }
    with scripted.serve(answer) as server:
      reward = registry.build(
        section(name="sum", members=members, endpoints=(server.url,)),
        world.WORLD,
      )
    assert list(reward.scorers) == ["net/service"]
    records = prompts.heldout_records()[:3]
    target = reward.encode(records)
    assert target["net"].tolist() == [0, 1, 2]
    jax.tree.map(
      np.testing.assert_array_equal,
      target["eye"],
      verifier.encode_records(records),
    )

  def test_evaluation_differs_where_a_judge_has_wordings_for_it(self):
    assert not registry.differs_in_evaluation(section(name="judge"))
    own = section(name="judge")
    own.judge.eval_system_file = "a"
    member = {"weight": 1.0, "judge": {"eval_prompt_file": "a"}}
    inner = {"weight": 1.0, "members": {"net": member}}
    of_a_sum = section(name="sum", members={"inner": inner})
    assert registry.differs_in_evaluation(own)
    assert registry.differs_in_evaluation(of_a_sum)

  def test_judge_of_evaluations_has_their_wording(self, tmp_path):
    path = tmp_path / "wording"
    path.write_text("Is this $prompt?")
    with scripted.serve(chat) as server:
      config = section(name="judge", endpoints=(server.url,))
      config.judge.eval_prompt_file = str(path)
      descriptions = [
        registry.build(config, evaluates=evaluates).describe()["judge"]
        for evaluates in (False, True)
      ]
    hashes = {description["wording_sha256"] for description in descriptions}
    assert len(hashes) == 2

  def test_judge_is_identified_by_the_content_of_its_files(self, tmp_path):
    descriptions = []
    with scripted.serve(chat) as server:
      for name in ("a", "b"):
        path = tmp_path / name
        path.write_text("Is this $prompt?")
        config = section(name="judge", endpoints=(server.url,))
        config.judge.prompt_file = str(path)
        config.judge.system_file = str(path)
        descriptions.append(registry.build(config).describe()["judge"])
    assert descriptions[0] == descriptions[1]

  def test_part_of_a_sum_can_be_trained(self):
    members = {"eye": {"name": "world", "weight": 1.0, "value": "correct"}}
    for value in ("strict", "eye", "eye/correct"):
      assert (
        "shaped"
        in registry.build(
          section(name="sum", members=members, value=value), world.WORLD
        ).parts
      )

  def test_clutter_costs_what_the_config_says(self):
    (record, *_) = prompts.heldout_records()
    scene = prompts.scene_for(record, np.random.default_rng(0))
    stacked = jax.tree.map(lambda leaf: leaf[None], scene)
    image = np.array(scenes.render(stacked))
    # A patch that is no object, in a blank cell.
    row, column = divmod(int(np.flatnonzero(scene.shape < 0)[0]), 3)
    image[0, 16 * row :, 16 * column :][4:12, 4:12] = 128

    def value(**changes) -> float:
      reward = registry.build(section(**changes), world.WORLD)
      score = reward.on(None)(image, reward.encode([record]))
      return float(score.value[0])

    assert value(name="world") == 1
    assert value(name="world", clutter_weight=9.0) == pytest.approx(1 / 2)
    # A member of a sum has its own weight.
    member = {"name": "world", "weight": 1.0, "clutter_weight": 9.0}
    assert value(name="sum", members={"a": member}) == pytest.approx(1 / 2)
    with pytest.raises(ValueError, match="a member of a sum may have its own"):
      value(name="sum", members={"a": member}, clutter_weight=9.0)

  @pytest.mark.parametrize(
    "changes, message",
    [
      (
        {
          "name": "sum",
          "members": {"a": {"name": "world", "weight": 1.0, "shuffle": True}},
        },
        "does not have: .'shuffle'.",
      ),
      (
        {
          "name": "service",
          "image_format": "gif",
          "endpoints": ("http://127.0.0.1:9",),
        },
        "reward.image_format must be one of",
      ),
      (
        {"name": "service", "client": {"deadlin": 3}},
        "reward.client has keys that a client does not have: .'deadlin'.",
      ),
      ({"name": "beauty"}, "reward.name must be one of .*; got 'beauty'"),
      ({"name": "sum"}, "reward.members must name at least one reward"),
      (
        {"name": "sum", "members": {"a": {"name": "world"}}},
        "reward.members.a must have a name and a weight; got .'name'.",
      ),
      (
        {
          "name": "sum",
          "members": {"a": {"name": "world", "weight": 1.0, "colour": 1}},
        },
        "keys that reward does not have: .'colour'.",
      ),
      (
        {"name": "service", "endpoints": ()},
        "reward.endpoints must name at least one service",
      ),
      (
        {"name": "service", "endpoints": ("http://127.0.0.1:9",)},
        "must answer GET /health before a run starts",
      ),
    ],
  )
  def test_section_that_cannot_be_used_is_refused(self, changes, message):
    with pytest.raises(ValueError, match=message):
      registry.build(section(**changes))


class TestConfigs:
  @pytest.mark.parametrize(
    "config, name",
    [
      (r3_geneval, "service"),
      (r3_geneval_plus, "judge"),
      (r3_tiif, "judge"),
      (r3_ocr, "service"),
    ],
  )
  def test_benchmark_has_its_reward(self, config, name):
    found = config.get_config()
    assert found.reward.name == name
    judge.JudgeSettings(**found.reward.judge)
    http_client.ClientSettings(
      endpoints=found.reward.endpoints,
      token_env=found.reward.token_env,
      **found.reward.client,
    )
    assert found.is_locked and (
      found.group_size,
      found.optimizer.gen_learning_rate,
    ) == (16, 5e-6)

  def test_embedded_world_has_the_verifier(self):
    config = r3_geneval.get_config("shapes")
    reward = registry.build(config.reward, world.WORLD)
    assert reward.scorers == {} and reward.parts == verifier.PARTS

  def test_reward_of_no_world_is_refused(self):
    with pytest.raises(
      ValueError, match="reward.name is 'world', so config.world must name"
    ):
      registry.build(section(name="world"))

"""Tests of rewards/remote/unirl.py against a server of its protocol."""

import base64
import json

import numpy as np
import pytest

from configs import r3_geneval
from r3jax.data import records
from r3jax.rewards import outcome
from r3jax.rewards import registry
from r3jax.rewards.remote import http_client
from r3jax.rewards.remote import protocol
from r3jax.rewards.remote import unirl
from tests.rewards import defaults
from tests.rewards import scripted

IMAGES = (
  np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3)).astype(np.uint8)
)
PROMPTS = [
  records.Prompt("colors", f"a photo of {i}", (records.Expectation("x", 1),))
  for i in range(5)
]


class Gateway:
  """Answers as UniRL's service; requests that it would refuse are an AssertionError.

  `rows` are results and errors of the reward "clip" for every request.
  """

  def __init__(self, rows=(), names=("clip", "hpsv2"), **more):
    self.rows, self.names, self.more = rows, names, more
    self.requests = []

  def __call__(self, request):
    if request.method == "GET":
      assert request.path == "/rewards"
      return 200, json.dumps({"rewards": self.names}).encode()
    assert request.path == "/score"
    body = json.loads(request.body)
    assert set(body) == {"protocol_version", "requests"}
    assert body["protocol_version"] == "1"
    for item in body["requests"]:
      assert set(item) == {"history", "required_rewards", "metadata"}
      assert item["required_rewards"] == ["clip"]
      (turn,) = item["history"]
      assert set(turn) == {"text", "image_b64"}
    self.requests.append(body["requests"])
    rows = self.rows[: len(body["requests"])]
    reply = {
      "results": [result for result, _ in rows],
      "errors": [error for _, error in rows],
    }
    return 200, json.dumps(reply | self.more).encode()


def ok(number, name="clip") -> tuple[dict, dict]:
  return {"clip": {name: number}}, {}


def make(server, reward="clip", number="", low=0.0, high=1.0):
  client = http_client.Client(
    defaults.client(
      endpoints=(server.url,), deadline=5.0, attempts=2, pause=0.01
    )
  )
  settings = unirl.UniRlSettings(reward, number, (low, high))
  return unirl.UniRlService(client, 8, "png", settings, (8, 8))


def score(rows, **changes) -> list[outcome.Outcome]:
  with scripted.serve(Gateway(rows)) as server:
    return make(server, **changes).score(IMAGES, PROMPTS)


class TestScore:
  def test_request_has_image_prompt_and_record(self):
    gateway = Gateway([ok(0.5)] * 5)
    with scripted.serve(gateway) as server:
      make(server).score(IMAGES, PROMPTS)
    ((*items,),) = gateway.requests
    for item, image, prompt in zip(items, IMAGES, PROMPTS, strict=True):
      (turn,) = item["history"]
      file = base64.b64decode(turn["image_b64"])
      np.testing.assert_array_equal(
        protocol.decode_image(file, "png", 64), image
      )
      assert turn["text"] == prompt.text
      assert item["metadata"] == prompt.to_json()

  def test_range_is_mapped_to_scores(self):
    numbers = [1, 2, 3.0, 4, 5]
    found = score([ok(number) for number in numbers], low=1.0, high=5.0)
    assert found == [
      outcome.Ok((number - 1) / 4, {"strict": strict}, {"number": number})
      for number, strict in zip(numbers, [0, 0, 0, 0, 1], strict=True)
    ]

  def test_numbers_of_zero_to_one_pass_through(self):
    numbers = [0.0, 0.1, 0.3, 0.7, 1.0]
    found = score([ok(number) for number in numbers])
    assert [result.score for result in found] == numbers

  def test_rounding_at_the_ends_of_the_range_is_no_failure(self):
    numbers = [-1.0000001, 1.0000001, float(np.float32(1) + np.spacing(1.0))]
    found = score([ok(number) for number in [*numbers, 1.0001, -2]], low=-1.0)
    assert [result.score for result in found[:3]] == [0.0, 1.0, 1.0]
    assert found[1].parts == {"strict": 1.0}
    assert {type(result) for result in found[3:]} == {outcome.Failed}

  def test_null_in_place_of_an_error_is_none(self):
    row = {"clip": {"clip": 0.5}}, {"clip": None}
    assert [result.score for result in score([row] * 5)] == [0.5] * 5
    (failure, *_) = score([({}, {"clip": None})] * 5)
    assert failure.reason == "clip gave neither a score nor an error"

  def test_image_without_a_number_leaves_the_others_theirs(self):
    found = score(
      [
        ok(0.25),
        ({}, {"clip": "RuntimeError('out of memory')", "hpsv2": "unasked"}),
        ok(1.5),
        ok(None),
        ok(float("nan")),
      ]
    )
    assert found == [
      outcome.Ok(0.25, {"strict": 0.0}, {"number": 0.25}),
      outcome.Failed("clip: RuntimeError('out of memory')"),
      outcome.Failed("clip gave 1.5, outside of reward.unirl.range (0.0, 1.0)"),
      outcome.Invalid("clip gave no number for clip"),
      outcome.Invalid("clip gave no number for clip"),
    ]

  @pytest.mark.parametrize(
    "row, reason",
    [
      (({}, {}), "clip gave neither a score nor an error"),
      (({"clip": 0.5}, {}), "clip gave neither a score nor an error"),
      (ok("0.5"), "must be a number; got a str"),
      (ok(True), "must be a number; got a bool"),
      (ok(float("inf")), "must be a finite number; got inf"),
      (
        ({"clip": {"b": 0.1, "a": 0.2}}, {}),
        "reward.unirl.number must be one that clip gives, ['a', 'b']; got ''",
      ),
    ],
  )
  def test_result_of_another_kind_is_a_failure(self, row, reason):
    found = score([row] * 5)
    assert {type(result) for result in found} == {outcome.Failed}
    assert reason in found[0].reason

  def test_one_of_several_numbers_is_chosen(self):
    row = {"clip": {"Alignment": 0.25, "Style": 3}}, {}
    found = score([row] * 5, number="Alignment")
    assert [result.score for result in found] == [0.25] * 5

  @pytest.mark.parametrize(
    "more, reason",
    [
      ({"results": []}, "results must be 5 objects; got 0"),
      ({"results": [1] * 5}, "results must be a list of objects"),
      ({"errors": [{}]}, "errors must be 5 objects; got 1"),
      ({"protocol_version": "2"}, "protocol_version must be '1'; got '2'"),
    ],
  )
  def test_other_reply_fails_the_batch(self, more, reason):
    with scripted.serve(Gateway([ok(0.5)] * 5, **more)) as server:
      found = make(server).score(IMAGES, PROMPTS)
    assert {type(result) for result in found} == {outcome.Failed}
    assert reason in found[0].reason

  @pytest.mark.parametrize("errors", [None, []])
  def test_errors_may_be_left_out(self, errors):
    with scripted.serve(Gateway([ok(0.5)] * 5, errors=errors)) as server:
      found = make(server).score(IMAGES, PROMPTS)
    assert [result.score for result in found] == [0.5] * 5


class TestStart:
  def test_only_reward_is_taken(self):
    with scripted.serve(Gateway(names=["clip"])) as server:
      described = make(server, reward="").describe()
    assert described == {
      "service": "unirl",
      "reward": "clip",
      "number": "",
      "range": [0.0, 1.0],
    }

  @pytest.mark.parametrize("reward", ["pickscore", ""])
  def test_reward_that_the_service_lacks_is_refused(self, reward):
    message = (
      rf"must be one that the service has, \['clip', 'hpsv2'\]; got '{reward}'"
    )
    with (
      scripted.serve(Gateway()) as server,
      pytest.raises(ValueError, match=message),
    ):
      make(server, reward=reward)

  def test_first_image_is_scored_once(self):
    gateway = Gateway([ok(7)])
    with scripted.serve(gateway) as server:
      service = make(server)
      for prompt in PROMPTS:
        service.check(prompt)  # outside of the range, which images may not be
    ((item,),) = gateway.requests
    assert item["history"][0]["text"] == PROMPTS[0].text

  @pytest.mark.parametrize(
    "gateway, reason",
    [
      (Gateway([({}, {"clip": "no GPU"})]), "clip: no GPU"),
      (Gateway([({"clip": {"a": 1, "b": 1}}, {})]), r"gives, \['a', 'b'\]"),
      (Gateway([]), "results must be 1 objects; got 0"),
    ],
  )
  def test_service_that_cannot_score_is_refused(self, gateway, reason):
    with (
      scripted.serve(gateway) as server,
      pytest.raises(
        ValueError, match=f"must score a first image .*: .*{reason}"
      ),
    ):
      make(server).check(PROMPTS[0])

  @pytest.mark.parametrize(
    "low, high", [(1, 0), (0, 0), (0, np.inf), (np.nan, 1)]
  )
  def test_range_that_is_none_is_refused(self, low, high):
    with pytest.raises(ValueError, match="reward.unirl.range must be two"):
      unirl.UniRlSettings("clip", "", (low, high))

  def test_config_describes_a_sum_of_rewards(self):
    section = r3_geneval.get_config().unlock().reward
    section.name = "sum"
    with scripted.serve(Gateway([ok(3)])) as server:
      section.endpoints = (server.url,)
      section.members = {
        "clip": {
          "name": "unirl",
          "weight": 1.0,
          "unirl": {"reward": "clip", "range": (1.0, 5.0)},
        }
      }
      reward = registry.build(section)
    described = reward.describe()["clip/unirl"]
    assert (described["reward"], described["range"]) == ("clip", [1.0, 5.0])

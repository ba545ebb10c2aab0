"""Tests of rewards/remote/services.py."""

import json
import pickle

import numpy as np
import pytest

from r3jax.data import records
from r3jax.rewards import outcome
from r3jax.rewards.remote import http_client
from r3jax.rewards.remote import protocol
from r3jax.rewards.remote import services
from tests.rewards import defaults
from tests.rewards import scripted

IMAGES = (
  np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3)).astype(np.uint8)
)
PROMPTS = [
  records.Prompt("colors", f"a photo of {i}", (records.Expectation("x", 1),))
  for i in range(5)
]
HEALTH = {
  "protocol": 1,
  "status": "ready",
  "parts": ["strict"],
  "reward": {"model": "mean brightness"},
}


def make(url, **changes):
  return http_client.Client(
    defaults.client(
      endpoints=(url,) if isinstance(url, str) else url,
      **{"deadline": 5.0, "attempts": 2, "pause": 0.01} | changes,
    )
  )


def brightness(request):
  """Answers the JSON protocol with the mean brightness, invalid for the prompt that ends with 3."""
  if request.method == "GET":
    return 200, json.dumps(HEALTH).encode()
  request_id, items = protocol.read_request(request.body)

  def score(item):
    return float(
      protocol.decode_image(item.image, item.format, 64).mean() / 255
    )

  outcomes = [
    outcome.Invalid("no 3")
    if item.record["prompt"].endswith("3")
    else outcome.Ok(score(item), {"strict": 0.0})
    for item in items
  ]
  return 200, protocol.make_reply(
    request_id, outcomes, protocol.identity(HEALTH["reward"])
  )


class TestJsonService:
  def test_every_image_gets_its_outcome(self):
    with scripted.serve(brightness) as server:
      service = services.JsonService(
        make(server.url), batch=2, kind="png", image_size=IMAGES.shape[1:3]
      )
      found = service.score(IMAGES, PROMPTS)
      assert [type(one) for one in found] == [outcome.Ok] * 3 + [
        outcome.Invalid,
        outcome.Ok,
      ]
      for i in (0, 1, 2, 4):
        assert found[i].score == pytest.approx(
          IMAGES[i].mean() / 255, abs=1e-12
        )
      assert sum(request.method == "POST" for request in server.requests) == 3
      assert service.parts == ("strict",)
      assert service.describe() == {
        "service": "json",
        "model": "mean brightness",
      }

  def test_failed_batch_is_missing_and_the_others_are_there(self):
    def answer(request):
      if request.method == "POST" and "a photo of 2" in request.body.decode():
        return 500, b""
      return brightness(request)

    with scripted.serve(answer) as server:
      found = services.JsonService(
        make(server.url), batch=2, kind="png", image_size=IMAGES.shape[1:3]
      ).score(IMAGES, PROMPTS)
      assert [type(one) for one in found] == [
        outcome.Ok,
        outcome.Ok,
        outcome.Failed,
        outcome.Failed,
        outcome.Ok,
      ]
      assert found[2].reason == "the service answered with status 500"

  def test_prompts_that_the_service_cannot_score_are_refused_at_the_start(
    self,
  ):
    """One image is sent, and only where a prompt lacks `include`."""
    expectation = records.Expectation("dog", 1)
    whole = records.Prompt("t", "a photo of 3", include=(expectation,))
    with scripted.serve(brightness) as server:
      service = services.JsonService(
        make(server.url), batch=2, kind="png", image_size=(8, 8)
      )
      service.check(whole)
      assert all(request.method == "GET" for request in server.requests)
      with pytest.raises(
        ValueError,
        match="to score the prompt 'a photo of 3', which has no field include; it answers: no 3",
      ):
        service.check(records.Prompt("t", "a photo of 3"))
      service.check(records.Prompt("t", "a photo of 3"))
      posts = [
        request for request in server.requests if request.method == "POST"
      ]
      assert len(posts) == 1

  def test_start_without_a_service_is_refused(self):
    message = (
      "must answer GET /health before a run starts; the answers were:"
      "\n  http://.*status 404"
    )
    with (
      scripted.serve(lambda request: (404, b"")) as server,
      pytest.raises(ValueError, match=message),
    ):
      services.JsonService(
        make(server.url), batch=2, kind="png", image_size=IMAGES.shape[1:3]
      )

  def test_one_of_two_endpoints_is_enough_to_start(self):
    with scripted.serve(brightness) as server:
      services.JsonService(
        make((server.url, "http://127.0.0.1:9")),
        batch=2,
        kind="png",
        image_size=IMAGES.shape[1:3],
      )

  def test_endpoints_that_differ_are_refused(self):
    other = json.dumps(HEALTH | {"reward": {"model": "another"}}).encode()
    with (
      scripted.serve(brightness) as one,
      scripted.serve(lambda request: (200, other)) as two,
      pytest.raises(ValueError, match="must serve the same reward"),
    ):
      services.JsonService(
        make((one.url, two.url)),
        batch=2,
        kind="png",
        image_size=IMAGES.shape[1:3],
      )

  def test_batch_below_one_is_refused(self):
    with pytest.raises(
      ValueError, match="reward.batch must be at least 1; got 0"
    ):
      services.JsonService(
        make("http://127.0.0.1:9"),
        batch=0,
        kind="png",
        image_size=IMAGES.shape[1:3],
      )


def flow_grpo_reply(**changes) -> bytes:
  numbers = {
    "scores": [0.25, -14.0, 1.0, 0.75, 1.0],
    "rewards": [0, 0, 1, 0, 1],
    "strict_rewards": [0, 0, 1.0, 0, 0],
  }
  return pickle.dumps(
    numbers
    | {"group_rewards": {"colors": [0, 1]}, "group_strict_rewards": {}}
    | changes
  )


class TestFlowGrpoService:
  def test_shaped_score_is_clipped_and_the_others_are_parts(self):
    def answer(request):
      body = pickle.loads(request.body)
      assert [record["prompt"] for record in body["meta_datas"]] == [
        prompt.text for prompt in PROMPTS
      ]
      assert all(image.startswith(b"\xff\xd8") for image in body["images"])
      assert body["only_strict"] is False
      return 200, flow_grpo_reply()

    with scripted.serve(answer) as server:
      found = services.FlowGrpoService(make(server.url), batch=8).score(
        IMAGES, PROMPTS
      )
    assert [one.score for one in found] == [0.25, 0, 1, 0.75, 1]
    assert [one.parts for one in found][2:] == [
      {"correct": 1, "strict": 1},
      {"correct": 0, "strict": 0},
      {"correct": 1, "strict": 0},
    ]
    assert found[1].detail == {"unclipped": -14.0}

  @pytest.mark.parametrize(
    "reply",
    [
      flow_grpo_reply(scores=[1.0]),
      flow_grpo_reply(rewards=[1] * 6),
      flow_grpo_reply(strict_rewards=[np.float64(1)] * 5),
      flow_grpo_reply(scores=[float("nan")] * 5),
      flow_grpo_reply(rewards=[-14.0] * 5),
      pickle.dumps([1]),
      b"Traceback",
      b"",
    ],
  )
  def test_other_reply_is_a_failure(self, reply):
    with scripted.serve(lambda request: (200, reply)) as server:
      found = services.FlowGrpoService(make(server.url), batch=8).score(
        IMAGES, PROMPTS
      )
    assert {type(one) for one in found} == {outcome.Failed}

  def test_endless_value_is_a_failure(self):
    nested = []
    for _ in range(60):
      nested = [nested, nested]
    body = flow_grpo_reply(scores=[nested] * 5)
    with scripted.serve(lambda request: (200, body)) as server:
      found = services.FlowGrpoService(make(server.url), batch=8).score(
        IMAGES, PROMPTS
      )
    assert found[0].reason.endswith(
      "must be a pickle of plain values: "
      "ValueError: it must have at most 200000 values"
    )

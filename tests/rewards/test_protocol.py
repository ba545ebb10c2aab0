"""Tests of rewards/remote/protocol.py."""

import json

import numpy as np
import pytest

from r3jax.data import records
from r3jax.rewards import outcome
from r3jax.rewards.remote import http_client
from r3jax.rewards.remote import protocol

PROMPT = records.Prompt.from_json(
  {
    "tag": "colors",
    "prompt": "a photo of a red bench",
    "include": [{"class": "bench", "count": 1}],
  }
)
IMAGE = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
OUTCOMES = [
  outcome.Ok(0.5, {"strict": 0.0}, {"why": "half"}),
  outcome.Failed("down"),
  outcome.Invalid("blank"),
]


def reply(**changes) -> bytes:
  return json.dumps(
    {
      "protocol": 1,
      "request_id": "a",
      "reward_id": "r",
      "outcomes": [{"status": "ok", "score": 1, "parts": {"strict": 1}}],
    }
    | changes
  ).encode()


class TestImages:
  def test_png_is_exact(self):
    assert (
      protocol.decode_image(protocol.encode_image(IMAGE, "png"), "png", 35)
      == IMAGE
    ).all()

  def test_jpeg_is_near(self):
    smooth = np.tile(np.arange(64, dtype=np.uint8)[:, None, None], (1, 64, 3))
    found = protocol.decode_image(
      protocol.encode_image(smooth, "jpeg"), "jpeg", 64 * 64
    )
    assert np.abs(found.astype(int) - smooth).max() <= 3

  @pytest.mark.parametrize(
    "file, kind, message",
    [
      (protocol.encode_image(IMAGE, "png"), "gif", "format must be one of"),
      (
        protocol.encode_image(IMAGE, "png"),
        "jpeg",
        "must be a readable jpeg file",
      ),
      (
        protocol.encode_image(IMAGE, "png")[:-60],
        "png",
        "must be a readable png file",
      ),
      (b"", "png", "must be a readable png file"),
      (b"<svg/>", "png", "must be a readable png file"),
    ],
  )
  def test_other_file_is_refused(self, file, kind, message):
    with pytest.raises(protocol.ProtocolError, match=message):
      protocol.decode_image(file, kind, 10**6)

  def test_large_image_is_refused_before_it_is_decoded(self):
    with pytest.raises(
      protocol.ProtocolError, match="at most 34 pixels; got 7 x 5"
    ):
      protocol.decode_image(protocol.encode_image(IMAGE, "png"), "png", 34)


class TestRequest:
  def test_round_trip(self):
    request_id, items = protocol.read_request(
      protocol.make_request("id", [IMAGE, IMAGE], [PROMPT, PROMPT], "png")
    )
    assert request_id == "id"
    assert [item.record for item in items] == [PROMPT.to_json()] * 2
    assert (
      protocol.decode_image(items[1].image, items[1].format, 35) == IMAGE
    ).all()

  @pytest.mark.parametrize(
    "body, message",
    [
      (b"", "must be a JSON object"),
      (b"\xff\xfe", "must be a JSON object"),
      (b"[1]", "not a list"),
      (b"[" * 100_000, "must be a JSON object"),
      (b'{"protocol": NaN}', "must be a JSON object"),
      (b'{"protocol": 2}', "protocol must be 1"),
      (b'{"protocol": 1}', "must have request_id"),
      (
        b'{"protocol": 1, "request_id": "a", "items": []}',
        "must have request_id",
      ),
      (
        b'{"protocol": 1, "request_id": "a", "items": [3]}',
        "must be an object with image",
      ),
      (
        b'{"protocol": 1, "request_id": "a", "items": [{"image": "?", "record": {}}]}',
        "must be base64",
      ),
      (
        b'{"protocol": 1, "request_id": "a", "items": [{"image": 3, "record": {}}]}',
        "must be base64",
      ),
    ],
  )
  def test_other_body_is_refused(self, body, message):
    with pytest.raises(protocol.ProtocolError, match=message):
      protocol.read_request(body)


class TestReply:
  def test_round_trip(self):
    assert (
      protocol.read_reply(
        protocol.make_reply("a", OUTCOMES, "r"), "a", 3, ("strict",), "r"
      )
      == OUTCOMES
    )

  @pytest.mark.parametrize(
    "body, message",
    [
      (b"<html>", "must be a JSON object"),
      (reply(protocol=0), "protocol must be 1"),
      (reply(request_id="b"), "answers another request"),
      (
        reply(reward_id="s"),
        "another reward answers than the one that the run began with",
      ),
      (reply(outcomes=[]), "must have 1 outcomes; got 0"),
      (reply(outcomes=None), "must have 1 outcomes; got NoneType"),
      (reply(outcomes=[1]), "an outcome must be an object"),
      (
        reply(outcomes=[{"status": "fine"}]),
        "status must be ok, failed or invalid",
      ),
      (reply(outcomes=[{"status": "ok", "score": 1}]), "must have the parts"),
      (
        reply(
          outcomes=[
            {"status": "ok", "score": 1, "parts": {"strict": 1, "more": 1}}
          ]
        ),
        "must have the parts",
      ),
      (
        reply(
          outcomes=[{"status": "ok", "score": 1.01, "parts": {"strict": 1}}]
        ),
        r"in \[0, 1\]; got 1.01",
      ),
      (
        reply(
          outcomes=[{"status": "ok", "score": "1", "parts": {"strict": 1}}]
        ),
        "must be a number; got a str",
      ),
      (
        reply(
          outcomes=[{"status": "ok", "score": True, "parts": {"strict": 1}}]
        ),
        "must be a number; got a bool",
      ),
      (
        reply(
          outcomes=[{"status": "ok", "score": None, "parts": {"strict": 1}}]
        ),
        "must be a number; got a NoneType",
      ),
      (
        reply(
          outcomes=[{"status": "ok", "score": 10**400, "parts": {"strict": 1}}]
        ),
        "must be finite as a float",
      ),
      (
        b'{"protocol": 1, "request_id": "a", "reward_id": "r", "outcomes": '
        b'[{"status": "ok", "score": NaN, "parts": {"strict": 1}}]}',
        "must be a JSON object",
      ),
      (
        reply(
          outcomes=[{"status": "ok", "score": 1, "parts": {"strict": -14}}]
        ),
        r"in \[0, 1\]; got -14",
      ),
      (
        reply(
          outcomes=[
            {"status": "ok", "score": 1, "parts": {"strict": 1}, "detail": 3}
          ]
        ),
        "detail must be a shallow object",
      ),
      (
        reply(
          outcomes=[
            {
              "status": "ok",
              "score": 1,
              "parts": {"strict": 1},
              "detail": {"x": "y" * 70_000},
            }
          ]
        ),
        "shallow object of finite values, of at most 65536",
      ),
      (
        b'{"protocol": 1, "request_id": "a", "reward_id": "r", "outcomes": '
        b'[{"status": "ok", "score": 1, "parts": {"strict": 1}, "detail": {"x": 1e999}}]}',
        "must be finite as a float; got 1e999",
      ),
      (
        b'{"protocol": 1, "request_id": "a", "reward_id": "r", "outcomes": '
        b'[{"status": "ok", "score": 1, "parts": {"strict": 1}, "detail": '
        + b'{"x": ' * 900
        + b"1"
        + b"}" * 900
        + b"}]}",
        "nested at most 50 levels deep",
      ),
      (
        b'{"protocol": 1, "request_id": "a", "reward_id": "r", "outcomes": '
        b'[{"status": "ok", "score": 1, "parts": {"strict": 1}, "detail": '
        + b'{"x": ' * 25
        + b"1"
        + b"}" * 25
        + b"}]}",
        "detail must be a shallow object",
      ),
    ],
  )
  def test_other_reply_gives_no_outcome(self, body, message):
    with pytest.raises(http_client.BadReply, match=message):
      protocol.read_reply(body, "a", 1, ("strict",), "r")


class TestHealth:
  @pytest.mark.parametrize(
    "changes, message",
    [
      ({"status": "draining"}, "must say that it is ready"),
      ({"parts": ["correct"]}, 'must give the part "strict"'),
      ({"parts": "strict"}, "parts must be a list"),
      ({"reward": None}, "say what its reward is"),
    ],
  )
  def test_other_answer_is_refused(self, changes, message):
    body = {
      "protocol": 1,
      "status": "ready",
      "parts": ["strict"],
      "reward": {"model": "m"},
    }
    assert protocol.read_health(json.dumps(body).encode()) == protocol.Health(
      ("strict",), {"model": "m"}
    )
    with pytest.raises(http_client.BadReply, match=message):
      protocol.read_health(json.dumps(body | changes).encode())

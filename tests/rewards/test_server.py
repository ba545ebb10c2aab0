"""Tests of rewards/serving/server.py, and of launch/serve_reward.py in a process of its own."""

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import jax
import numpy as np
import pytest

from r3jax.data import records
from r3jax.rewards import outcome
from r3jax.rewards.remote import http_client
from r3jax.rewards.remote import protocol
from r3jax.rewards.remote import services
from r3jax.rewards.serving import server as server_lib
from r3jax.worlds.shapes import prompts
from r3jax.worlds.shapes import scenes as scenes_lib
from r3jax.worlds.shapes import verifier
from tests.rewards import defaults

ROOT = pathlib.Path(__file__).parents[2]
HALF = protocol.identity({"model": "half"})
PROMPT = records.Prompt("t", "p", (records.Expectation("x", 1),))


class Slow:
  """Gives every image half a point once it may."""

  parts = ("strict",)

  def __init__(self):
    self.free = threading.Event()
    self.free.set()
    self.shapes = []

  def check(self, prompt):
    pass

  def score(self, images, prompts):
    self.free.wait(20)
    self.shapes.append(images.shape)
    return [outcome.Ok(0.5, {"strict": 0.0})] * len(images)

  def describe(self):
    return {"model": "half"}

  def metrics(self):
    return {}


@contextlib.contextmanager
def serving(token="", **limits):
  """Yields (server, reward, url)."""
  reward = Slow()
  server = server_lib.Server(
    ("127.0.0.1", 0), reward, token, server_lib.Limits(**limits)
  )
  thread = threading.Thread(target=server.serve_forever, args=(0.02,))
  thread.start()
  try:
    yield server, reward, f"http://127.0.0.1:{server.server_address[1]}"
  finally:
    reward.free.set()
    server.shutdown()
    thread.join()
    server.server_close()


def request(number=1, size=4, kind="png") -> bytes:
  return protocol.make_request(
    "id",
    [np.zeros((size, size, 3), np.uint8)] * number,
    [PROMPT] * number,
    kind,
  )


def score(url, body, **arguments) -> httpx.Response:
  return httpx.post(
    url + protocol.SCORE_PATH,
    content=body,
    timeout=20,
    trust_env=False,
    **arguments,
  )


class TestServer:
  def test_scores_what_it_is_sent(self):
    with serving() as (_, _, url):
      reply = score(url, request(3))
      assert (
        protocol.read_reply(reply.content, "id", 3, ("strict",), HALF)
        == [outcome.Ok(0.5, {"strict": 0.0})] * 3
      )

  def test_health_says_what_scores(self):
    with serving() as (_, _, url):
      assert httpx.get(url + "/health", trust_env=False).json() == {
        "protocol": 1,
        "status": "ready",
        "parts": ["strict"],
        "reward": {"model": "half"},
      }

  def test_unreadable_image_is_invalid_and_the_others_are_scored(self):
    message = json.loads(request(3))
    message["items"][1]["format"] = "gif"
    with serving() as (_, reward, url):
      found = protocol.read_reply(
        score(url, json.dumps(message).encode()).content,
        "id",
        3,
        ("strict",),
        HALF,
      )
      assert [type(one) for one in found] == [
        outcome.Ok,
        outcome.Invalid,
        outcome.Ok,
      ]
      assert (
        found[1].reason == "format must be one of ['png', 'jpeg']; got 'gif'"
      )
      assert reward.shapes == [(2, 4, 4, 3)]

  def test_images_of_other_sizes_are_scored_apart(self):
    message = json.loads(request(2))
    message["items"] += json.loads(request(1, size=6))["items"]
    with serving() as (_, reward, url):
      found = protocol.read_reply(
        score(url, json.dumps(message).encode()).content,
        "id",
        3,
        ("strict",),
        HALF,
      )
      assert [type(one) for one in found] == [outcome.Ok] * 3
      assert reward.shapes == [(2, 4, 4, 3), (1, 6, 6, 3)]

  @pytest.mark.parametrize(
    "limits, body, status",
    [
      ({"max_body_bytes": 100}, request(), 413),
      ({"max_items": 2}, request(3), 413),
      ({}, b"<html>", 400),
      ({}, b"", 400),
    ],
  )
  def test_bad_request_is_refused(self, limits, body, status):
    with serving(**limits) as (_, _, url):
      reply = score(url, body)
      assert reply.status_code == status and reply.json()["protocol"] == 1
      assert score(url, request()).status_code == (
        413 if "max_body_bytes" in limits else 200
      )

  def test_large_image_is_invalid(self):
    with serving(max_pixels=15) as (_, _, url):
      (found,) = protocol.read_reply(
        score(url, request()).content, "id", 1, ("strict",), HALF
      )
      assert found == outcome.Invalid(
        "an image must have at most 15 pixels; got 4 x 4"
      )

  def test_images_of_a_request_are_bounded_together(self):
    with serving(max_request_pixels=40) as (_, _, url):
      found = protocol.read_reply(
        score(url, request(4)).content, "id", 4, ("strict",), HALF
      )
      assert [type(one) for one in found] == [outcome.Ok] * 2 + [
        outcome.Invalid
      ] * 2

  def test_reward_that_fails_is_said(self, monkeypatch):
    with serving() as (_, reward, url):
      monkeypatch.setattr(reward, "score", lambda images, records: 1 // 0)
      assert score(url, request()).status_code == 500
      monkeypatch.undo()
      assert score(url, request()).status_code == 200

  def test_body_of_unknown_length_is_refused(self):
    with serving() as (_, _, url):
      assert score(url, iter([b"{}"])).status_code == 411

  @pytest.mark.parametrize(
    "headers",
    [
      "Transfer-Encoding: chunked\r\nContent-Length: 4",
      "Content-Length: 4\r\nContent-Length: 40",
    ],
  )
  def test_body_of_two_lengths_is_refused(self, headers):
    body = b"2\r\n{}\r\n0\r\n\r\nGET /health HTTP/1.1\r\n\r\n"
    with serving() as (service, _, _):
      address = service.server_address
      with socket.create_connection(address, timeout=30) as connection:
        head = f"POST /v1/score HTTP/1.1\r\n{headers}\r\n\r\n".encode()
        connection.sendall(head + body)
        reply = b""
        with contextlib.suppress(ConnectionResetError):
          while chunk := connection.recv(4096):
            reply += chunk
    # The rest of the body is no request of its own.
    assert reply.startswith(b"HTTP/1.1 411")
    assert reply.count(b"HTTP/1.1") == 1

  def test_other_paths_are_not_there(self):
    with serving() as (_, _, url):
      assert httpx.get(url + "/", trust_env=False).status_code == 404
      assert (
        httpx.post(url + "/", content=b"", trust_env=False).status_code == 404
      )

  def test_token_is_asked_for(self):
    with serving(token="hunter2") as (_, _, url):
      assert score(url, request()).status_code == 401
      assert (
        score(
          url, request(), headers={"Authorization": "Bearer hunter"}
        ).status_code
        == 401
      )
      assert httpx.get(url + "/health", trust_env=False).status_code == 401
      assert (
        score(
          url, request(), headers={"Authorization": "Bearer hunter2"}
        ).status_code
        == 200
      )

  def test_full_queue_is_told_to_come_back(self):
    with serving(queue=1) as (_, reward, url):
      reward.free.clear()
      statuses = []
      threads = [
        threading.Thread(
          target=lambda: statuses.append(score(url, request()).status_code)
        )
        for _ in range(6)
      ]
      for thread in threads:
        thread.start()
      while len(statuses) < 4:
        time.sleep(0.01)
      assert statuses == [429] * 4
      reward.free.set()
      for thread in threads:
        thread.join()
      assert sorted(statuses) == [200] * 2 + [429] * 4

  def test_drains_before_it_ends(self):
    with serving() as (server, reward, url):
      reward.free.clear()
      replies = []
      thread = threading.Thread(
        target=lambda: replies.append(score(url, request()))
      )
      thread.start()
      while not server._num_answering:
        time.sleep(0.01)
      drain = threading.Thread(target=server.drain, args=(20,))
      drain.start()
      while not server.draining:
        time.sleep(0.01)
      assert (
        httpx.get(url + "/health", trust_env=False).json()["status"]
        == "draining"
      )
      assert score(url, request()).status_code == 503
      reward.free.set()
      thread.join()
      drain.join()
      assert replies[0].status_code == 200

  def test_drain_gives_up_after_its_time(self):
    with serving() as (server, reward, url):
      reward.free.clear()
      thread = threading.Thread(target=score, args=(url, request()))
      thread.start()
      while not server._num_answering:
        time.sleep(0.01)
      start = time.monotonic()
      server.drain(0.3)
      assert time.monotonic() - start < 3
      reward.free.set()
      thread.join()

  def test_silent_connection_is_closed(self):
    with (
      serving(idle_seconds=0.2) as (server, _, _),
      socket.create_connection(server.server_address) as connection,
    ):
      connection.sendall(
        b"POST /v1/score HTTP/1.1\r\nContent-Length: 10\r\n\r\n123"
      )
      connection.settimeout(5)
      assert connection.recv(100) == b""

  @pytest.mark.parametrize(
    "start",
    [b"POST /v1/sc", b"GET /health HTTP/1.1\r\nX-A: ", b"\r\n"],
    ids=["first line", "header", "blank line"],
  )
  def test_request_that_drips_is_closed_after_its_time(self, start):
    with (
      serving(idle_seconds=0.4) as (server, _, _),
      socket.create_connection(server.server_address) as connection,
    ):
      begin = time.monotonic()
      connection.sendall(start)
      connection.settimeout(0.05)
      ended = False
      # A byte before every timeout of a single read.
      while not ended and time.monotonic() < begin + 5:
        with contextlib.suppress(TimeoutError):
          ended = connection.recv(100) == b""
        with contextlib.suppress(OSError):
          connection.sendall(b"x")
      assert ended and time.monotonic() - begin < 2

  def test_body_that_drips_is_closed_after_its_time(self):
    with (
      serving(idle_seconds=0.4) as (server, _, url),
      socket.create_connection(server.server_address) as connection,
    ):
      begin = time.monotonic()
      connection.sendall(
        b"POST /v1/score HTTP/1.1\r\nContent-Length: 999\r\n\r\n"
      )
      connection.settimeout(0.05)
      ended = False
      while not ended and time.monotonic() < begin + 5:
        with contextlib.suppress(TimeoutError):
          ended = connection.recv(100) == b""
        with contextlib.suppress(OSError):
          connection.sendall(b"x")
      assert ended and time.monotonic() - begin < 2
      assert httpx.get(f"{url}/health").status_code == 200

  @pytest.mark.parametrize(
    "limits", [{"max_connections": 2}, {"max_connections_per_client": 2}]
  )
  def test_connections_are_bounded(self, limits):
    with (
      serving(idle_seconds=20, **limits) as (server, _, url),
      socket.create_connection(server.server_address),
    ):
      with socket.create_connection(server.server_address):
        answer = httpx.get(f"{url}/health")
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "1"
      end = time.monotonic() + 5
      while httpx.get(f"{url}/health").status_code != 200:
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture(scope="module")
def command(tmp_path_factory):
  """Yields (process, url, log) of the command."""
  log = tmp_path_factory.mktemp("server") / "log"
  environment = os.environ | {
    "PYTHONPATH": str(ROOT),
    "R3JAX_TEST_TOKEN": "hunter2",
    "XLA_FLAGS": "",
  }
  line = [
    sys.executable,
    "launch/serve_reward.py",
    "--port=0",
    "--token_env=R3JAX_TEST_TOKEN",
  ]
  with log.open("w") as file:
    process = subprocess.Popen(
      line, cwd=ROOT, env=environment, stdout=file, stderr=file
    )
  while not (
    found := re.search(r"serving shapes at (http://\S+)", log.read_text())
  ):
    assert process.poll() is None, log.read_text()
    time.sleep(0.05)
  yield process, found[1], log
  process.kill()
  process.wait()


def drawn(number: int) -> tuple[np.ndarray, list[dict]]:
  """Returns images that show, mostly, what their records ask for."""
  rng, every = np.random.default_rng(0), prompts.heldout_records()
  records = [every[i] for i in rng.integers(len(every), size=number)]
  drawn_for = [
    every[i] if rng.random() < 0.3 else record
    for i, record in zip(rng.integers(len(every), size=number), records)
  ]
  scenes = [prompts.scene_for(record, rng) for record in drawn_for]
  return np.asarray(
    scenes_lib.render(jax.tree.map(lambda *x: np.stack(x), *scenes))
  ), records


class TestCommand:
  def test_500_images_score_as_in_the_process(self, command, monkeypatch):
    _, url, _ = command
    monkeypatch.setenv("R3JAX_TEST_TOKEN", "hunter2")
    images, records = drawn(500)
    settings = defaults.client(
      endpoints=(url,), token_env="R3JAX_TEST_TOKEN", concurrency=8
    )
    service = services.JsonService(
      http_client.Client(settings), batch=16, kind="png", image_size=(48, 48)
    )
    found = outcome.to_score(service.score(images, records), service.parts)
    expected = jax.device_get(
      jax.jit(verifier.verify)(images, verifier.encode_records(records))
    )
    assert found.valid.all()
    np.testing.assert_array_equal(found.value, expected.value)
    for name, part in expected.parts.items():
      np.testing.assert_array_equal(found.parts[name], part)
    assert 0.2 < (found.value == 1).mean() < 0.9
    metrics = service.metrics()
    assert (metrics["requests"], metrics["failed"], metrics["queue"]) == (
      32,
      0,
      32,
    )

  def test_wrong_size_and_record_are_invalid(self, command, monkeypatch):
    _, url, _ = command
    monkeypatch.setenv("R3JAX_TEST_TOKEN", "hunter2")
    settings = defaults.client(endpoints=(url,), token_env="R3JAX_TEST_TOKEN")
    service = services.JsonService(
      http_client.Client(settings), batch=16, kind="png", image_size=(48, 48)
    )
    (small,) = service.score(
      np.zeros((1, 32, 48, 3), np.uint8), prompts.heldout_records()[:1]
    )
    assert small == outcome.Invalid(
      "an image must be 48 x 48 pixels; got (32, 48, 3)"
    )
    found = service.score(
      np.zeros((3, 48, 48, 3), np.uint8),
      [PROMPT, records.Prompt("t", "p"), records.Prompt("", "p")],
    )
    assert all(
      isinstance(one, outcome.Invalid) and "cannot be judged" in one.reason
      for one in found
    )

  def test_ends_on_sigterm_with_a_line_about_its_work(self, command):
    process, url, log = command
    assert (
      score(
        url, request(), headers={"Authorization": "Bearer hunter2"}
      ).status_code
      == 200
    )
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0
    assert re.search(
      r"ended: \d+ requests, \d+ images, [\d.]+ images/s, seconds per request p50 [\d.]+ p99",
      log.read_text(),
    )
    assert "hunter2" not in log.read_text()

  def test_missing_token_is_refused(self):
    line = [
      sys.executable,
      "launch/serve_reward.py",
      "--port=0",
      "--token_env=R3JAX_NO_SUCH",
    ]
    done = subprocess.run(
      line,
      cwd=ROOT,
      env=os.environ | {"PYTHONPATH": str(ROOT)},
      capture_output=True,
      text=True,
    )
    assert done.returncode == 1
    assert done.stderr.strip().endswith(
      "r3jax: --token_env must name a variable of the environment that is set"
    )

"""Tests of rewards/remote/http_client.py against a server that does as it is told."""

import contextlib
import dataclasses
import json
import socket
import threading
import time

import pytest

from r3jax.files import texts
from r3jax.rewards.remote import http_client
from tests.rewards import defaults
from tests.rewards import scripted

QUICK = {"deadline": 5.0, "attempts": 3, "pause": 0.01, "open_seconds": 0.3}


def make(*urls, **changes):
  return http_client.Client(defaults.client(endpoints=urls, **QUICK | changes))


def parse(body: bytes) -> dict:
  try:
    return json.loads(body)
  except ValueError as error:
    raise http_client.BadReply("no JSON") from error


def post(client, body=b"{}"):
  return client.post("/", body, "application/json", parse)


@contextlib.contextmanager
def dripping(first: bytes):
  """Yields the URL of a server that sends `first` and then a byte every tenth of a second."""
  listener, over = socket.create_server(("127.0.0.1", 0)), threading.Event()

  def drip():
    with contextlib.suppress(OSError):
      connection, _ = listener.accept()
      connection.sendall(first)
      while not over.wait(0.1):
        connection.sendall(b"x")

  thread = threading.Thread(target=drip)
  thread.start()
  yield f"http://127.0.0.1:{listener.getsockname()[1]}"
  over.set()
  listener.close()
  thread.join()


def failing_first(number: int, failure):
  """Answers the first `number` requests with a failure and {"n": k} afterwards."""
  count = iter(range(10**6))

  def answer(request):
    k = next(count)
    return failure if k < number else (200, json.dumps({"n": k}).encode())

  return answer


class TestSettings:
  @pytest.mark.parametrize(
    "changes, message",
    [
      ({"endpoints": ()}, "reward.endpoints must name at least one service"),
      (
        {"endpoints": ("http://a", "localhost:8000")},
        r"reward.endpoints\[1\] must be http://HOST",
      ),
      (
        {"endpoints": ("ftp://a",)},
        r"reward.endpoints\[0\] must be http://HOST",
      ),
      ({"deadline": 0.0}, "reward.deadline must be above 0; got 0.0"),
      ({"attempts": 0}, "reward.attempts must be at least 1; got 0"),
      (
        {"token_env": "R3JAX_NO_SUCH"},
        "reward.token_env must name a variable of the environment that is set",
      ),
    ],
  )
  def test_bad_setting_is_refused(self, changes, message):
    with pytest.raises(ValueError, match=message):
      defaults.client(**{"endpoints": ("http://a",)} | changes)

  @pytest.mark.parametrize(
    "url",
    [
      "http://me:hunter2@host/",
      "http://host/?key=hunter2",
      "http://host/#hunter2",
      "me:hunter2@host:80",
      "http:/me:hunter2@host",
    ],
  )
  def test_key_in_an_endpoint_is_refused_without_showing_it(self, url):
    with pytest.raises(
      ValueError, match=r"reward.endpoints\[0\] must"
    ) as error:
      defaults.client(endpoints=(url,))
    assert "hunter2" not in str(error.value)


class TestPost:
  def test_returns_what_the_parser_makes(self):
    with scripted.serve(lambda request: (200, request.body)) as server:
      assert post(make(server.url), b'{"a": 1}') == {"a": 1}
      assert server.requests[0].headers["Content-Type"] == "application/json"

  @pytest.mark.parametrize(
    "failure",
    [(500, b"x"), (502, b""), (503, b""), (200, b"<html>"), None],
    ids=["500", "502", "503", "html", "dropped"],
  )
  def test_passing_failure_is_tried_again(self, failure):
    with scripted.serve(failing_first(2, failure)) as server:
      client = make(server.url)
      assert post(client) == {"n": 2}
      assert client.metrics()["retries"] == 2

  def test_gives_up_after_the_attempts(self):
    with scripted.serve(lambda request: (500, b"out of memory")) as server:
      client = make(server.url)
      with pytest.raises(
        http_client.RequestFailed,
        match="^the service answered with status 500: out of memory$",
      ) as error:
        post(client)
      assert not error.value.refused
      assert len(server.requests) == 3

  @pytest.mark.parametrize("status", [400, 401, 404, 413])
  def test_refusal_is_final(self, status):
    with scripted.serve(lambda request: (status, b"")) as server:
      with pytest.raises(
        http_client.RequestFailed, match=f"status {status}"
      ) as error:
        post(make(server.url, failures_to_open=1))
      assert error.value.refused
      assert len(server.requests) == 1

  def test_redirect_is_not_followed(self):
    with (
      scripted.serve(lambda request: (302, b"")) as server,
      pytest.raises(http_client.RequestFailed, match="status 302"),
    ):
      post(make(server.url))

  def test_deadline_holds_over_all_tries(self):
    release = threading.Event()
    with scripted.serve(lambda request: release.wait(20) and None) as server:
      start = time.monotonic()
      with pytest.raises(http_client.RequestFailed, match="no reply in time"):
        post(make(server.url, deadline=0.4, attempts=10))
      assert time.monotonic() - start < 2
      release.set()

  def test_no_server_is_a_failure(self):
    with scripted.serve(lambda request: (200, b"{}")) as server:
      pass
    with pytest.raises(
      http_client.RequestFailed, match="no connection or a broken one"
    ):
      post(make(server.url))

  def test_long_reply_is_refused(self):
    with (
      scripted.serve(lambda request: (200, b"1" * 1001)) as server,
      pytest.raises(http_client.RequestFailed, match="longer than 1000 bytes"),
    ):
      post(make(server.url, max_reply_bytes=1000))

  @pytest.mark.parametrize(
    "first",
    [b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n"],
    ids=["headers", "body"],
  )
  def test_deadline_holds_for_a_reply_in_drops(self, first):
    with dripping(first) as url:
      start = time.monotonic()
      with pytest.raises(http_client.RequestFailed, match="no reply in time"):
        post(make(url, deadline=0.5, attempts=1))
      assert time.monotonic() - start < 1.5

  def test_compressed_reply_is_refused(self):
    with (
      scripted.serve(
        lambda request: (200, b"{}", {"Content-Encoding": "gzip"})
      ) as server,
      pytest.raises(
        http_client.RequestFailed, match="compressed, which was not asked for"
      ),
    ):
      post(make(server.url))

  def test_token_is_sent_and_never_said(self, monkeypatch):
    monkeypatch.setenv("R3JAX_TEST_TOKEN", "hunter2")
    with scripted.serve(lambda request: (401, b"")) as server:
      client = make(server.url, token_env="R3JAX_TEST_TOKEN")
      with pytest.raises(http_client.RequestFailed) as error:
        post(client)
      assert server.requests[0].headers["Authorization"] == "Bearer hunter2"
      assert "hunter2" not in str(error.value) + repr(client.settings) + str(
        dataclasses.asdict(client.settings)
      )

  @pytest.mark.parametrize(
    "body, message",
    [
      (b'{"error": {"message": "too\\nlong", "code": 400}}', ": too long"),
      (b'{"error": "no such model"}', ": no such model"),
      (b'{"detail": [{"loc": ["requests"]}]}', r': [{"loc": ["requests"]}]'),
      (b"<h1>Bad\n Gateway</h1>\x1b[2J", ": <h1>Bad Gateway</h1> [2J"),
      (b"y" * 10**6, ": " + texts.shorten("y" * 10**6, 500)),
      (b"[" * 100_000, ": " + texts.shorten("[" * 100_000, 500)),
      (b"", ""),
    ],
  )
  def test_what_the_service_says_is_part_of_the_failure(self, body, message):
    expected = "the service answered with status 500" + message
    with scripted.serve(lambda request: (500, body)) as server:
      client = make(server.url, attempts=1)
      with pytest.raises(http_client.RequestFailed) as posted:
        post(client)
      (asked,) = client.ask_each("/health", parse).values()
    assert str(posted.value) == str(asked) == expected

  def test_token_that_the_service_repeats_is_not_shown(self, monkeypatch):
    monkeypatch.setenv("TOKEN_OF_TEST", "sk-secret")
    body = b'{"error": {"message": "bad key sk-secret", "code": "invalid"}}'
    with scripted.serve(lambda request: (401, body)) as server:
      client = make(server.url, token_env="TOKEN_OF_TEST")
      with pytest.raises(http_client.RequestFailed) as failure:
        post(client)
    assert str(failure.value).endswith("status 401: bad key ***")
    assert failure.value.refused and failure.value.code == "invalid"

  @pytest.mark.parametrize(
    "echo",
    ["sk-s/cret", "sk-s\\/cret", "\\u0073k-s/cre\\u0074", "sk\\u002Ds/cret"],
    ids=["plain", "slash", "escaped", "upper case"],
  )
  def test_token_in_a_reply_is_replaced_before_it_is_read(
    self, monkeypatch, echo
  ):
    monkeypatch.setenv("TOKEN_OF_TEST", "sk-s/cret")
    body = f'{{"answer": "the key {echo} is yours"}}'.encode()
    with scripted.serve(lambda request: (200, body)) as server:
      client = make(server.url, token_env="TOKEN_OF_TEST")
      reply = client.post("/", b"", "text/plain", json.loads)
    assert reply == {"answer": "the key *** is yours"}

  def test_request_that_is_not_sent_says_the_last_failure(self):
    with scripted.serve(lambda request: (500, b"out of memory")) as server:
      client = make(
        server.url, attempts=2, failures_to_open=2, open_seconds=9.0
      )
      for _ in range(2):
        with pytest.raises(http_client.RequestFailed) as failure:
          post(client)
        client.settings = dataclasses.replace(client.settings, deadline=0.05)
    assert str(failure.value) == (
      "every endpoint has failed repeatedly and is left alone for a while; the last failure: the "
      "service answered with status 500: out of memory"
    )

  @pytest.mark.parametrize(
    "base, path, asked",
    [
      ("/v1", "/v1/models", "/v1/models"),
      ("", "/v1/models", "/v1/models"),
      ("/api/v1/", "/v1/models", "/api/v1/models"),
      ("/v1", "/score", "/v1/score"),
    ],
  )
  def test_v1_is_not_doubled(self, base, path, asked):
    with scripted.serve(lambda request: (200, b"{}")) as server:
      make(server.url + base).ask_each(path, parse)
      assert server.requests[0].path == asked

  def test_proxy_of_the_environment_is_not_used(self, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with scripted.serve(lambda request: (200, b"{}")) as server:
      assert post(make(server.url)) == {}


class TestRouting:
  def test_goes_where_least_is_under_way(self):
    busy = threading.Event()
    with (
      scripted.serve(lambda request: busy.wait(20) and (200, b"{}")) as slow,
      scripted.serve(lambda request: (200, b"{}")) as quick,
    ):
      client = make(slow.url, quick.url, concurrency=4)
      first = threading.Thread(target=post, args=(client,))
      first.start()
      while not slow.requests:
        time.sleep(0.005)
      for _ in range(6):
        post(client)
      busy.set()
      first.join()
      assert (len(slow.requests), len(quick.requests)) == (1, 6)

  def test_broken_endpoint_is_left_alone_and_tried_again(self):
    state = {"status": 500}
    with scripted.serve(lambda request: (state["status"], b"{}")) as server:
      client = make(server.url, failures_to_open=3, attempts=3)
      with pytest.raises(http_client.RequestFailed, match="status 500"):
        post(client)
      assert client.metrics()["endpoints_open"] == 1
      state["status"] = 200
      start = time.monotonic()
      assert post(client) == {}  # waits until it is tried again
      assert 0.1 < time.monotonic() - start < 2
      assert len(server.requests) == 4
      assert client.metrics()["endpoints_open"] == 0

  def test_outage_is_waited_out_for_one_deadline_in_all(self):
    with scripted.serve(lambda request: (500, b"")) as server:
      client = make(
        server.url,
        failures_to_open=1,
        attempts=1,
        deadline=0.5,
        open_seconds=30.0,
      )
      with pytest.raises(http_client.RequestFailed, match="status 500"):
        post(client)
      seconds = []
      for _ in range(20):
        start = time.monotonic()
        with pytest.raises(
          http_client.RequestFailed,
          match="every endpoint has failed repeatedly",
        ):
          post(client)
        seconds.append(time.monotonic() - start)
      assert seconds[0] > 0.3 and sum(seconds[2:]) < 0.3
      assert len(server.requests) == 1

  def test_short_outage_loses_nothing(self):
    up = time.monotonic() + 0.6
    with scripted.serve(
      lambda request: (200, b"{}") if time.monotonic() > up else (500, b"")
    ) as server:
      client = make(
        server.url,
        attempts=4,
        failures_to_open=5,
        open_seconds=0.3,
        deadline=20.0,
      )
      assert client.map(lambda _: post(client), range(16)) == [{}] * 16

  @pytest.mark.parametrize("status", [429, 503])
  def test_busy_service_is_asked_again_when_it_says(self, status):
    count = iter(range(100))

    def answer(request):
      return (
        (status, b"", {"Retry-After": "1"}) if next(count) < 1 else (200, b"{}")
      )

    with scripted.serve(answer) as server:
      client = make(server.url, attempts=1, failures_to_open=1)
      start = time.monotonic()
      assert post(client) == {}
      assert time.monotonic() - start >= 1
      assert client.metrics()["endpoints_open"] == 0

  def test_others_wait_for_the_one_that_tries_again(self):
    answers = failing_first(1, (500, b""))

    def slow(request):
      return time.sleep(0.2) or answers(request)

    with scripted.serve(slow) as server:
      client = make(server.url, failures_to_open=1, attempts=1)
      with pytest.raises(http_client.RequestFailed):
        post(client)
      time.sleep(0.35)
      found = client.map(lambda _: post(client), range(4))
      assert sorted(one["n"] for one in found) == [1, 2, 3, 4]

  def test_good_endpoint_serves_what_a_broken_one_cannot(self):
    with (
      scripted.serve(lambda request: (500, b"")) as broken,
      scripted.serve(lambda request: (200, b"{}")) as good,
    ):
      client = make(broken.url, good.url, attempts=4)
      assert client.map(lambda _: post(client), range(40)) == [{}] * 40
      assert client.metrics()["failed"] == 0


class TestMap:
  def test_keeps_the_order_and_bounds_concurrency(self):
    with scripted.serve(
      lambda request: time.sleep(0.02) or (200, request.body)
    ) as server:
      client = make(server.url, concurrency=3)
      assert client.map(
        lambda i: post(client, json.dumps(i).encode()), range(12)
      ) == list(range(12))
      assert 2 <= server.most_under_way <= 3

  def test_exception_of_the_call_comes_out(self):
    with pytest.raises(ZeroDivisionError):
      make("http://127.0.0.1:9").map(lambda i: 1 // i, [1, 0])


class TestMetrics:
  def test_counts_since_the_last_reading(self):
    with scripted.serve(failing_first(4, (500, b""))) as server:
      client = make(server.url, failures_to_open=100)
      for _ in range(3):
        with contextlib.suppress(http_client.RequestFailed):
          post(client)
      found = client.metrics()
      assert (found["requests"], found["failed"], found["retries"]) == (3, 1, 3)
      assert found["failure_rate"] == pytest.approx(1 / 3)
      assert 0 < found["p50_seconds"] <= found["p99_seconds"] < 2
      assert client.metrics() == {
        "requests": 0,
        "failed": 0,
        "retries": 0,
        "queue": 0,
        "endpoints_open": 0,
      }

  def test_queue_is_the_most_that_waited(self):
    with scripted.serve(lambda request: (200, b"{}")) as server:
      client = make(server.url, concurrency=2)
      client.map(lambda _: post(client), range(9))
      assert client.metrics()["queue"] == 9

"""The one HTTP client under all reward services: routing, deadlines, retries, circuit breaking.

A request goes to the endpoint with the fewest requests under way. An endpoint that fails several
times in a row is left alone for a while, then tried with a single request, for which the others
wait. What can go right the next time (no connection, a timeout, 5xx, a reply that makes no sense)
is tried again, after a pause that doubles and is drawn at random; a service that says it is busy
(429, or 503 with Retry-After) is asked again when it says so. All tries share one deadline, which holds for every read
and write of the connection. When no endpoint has worked for a whole deadline, requests fail at once
but for the ones that try again.

Keys come from the environment and go into no message, log or config.
"""

from collections.abc import Callable, Sequence
from concurrent import futures
import dataclasses
import os
import random
import threading
import time
from typing import TypeVar
import urllib.parse

import httpcore
import numpy as np

T = TypeVar("T")
R = TypeVar("R")


class RequestFailed(Exception):
  """A request got no usable reply; the text says why, for the log.

  Attributes:
    refused: whether the service works and refused the request (4xx).
  """

  def __init__(self, reason: str, refused: bool = False):
    super().__init__(reason)
    self.refused = refused


class BadReply(Exception):
  """Raised by a parser: the reply is not what the protocol says. The request is tried again."""


@dataclasses.dataclass(frozen=True)
class Settings:
  """How services are called.

  Attributes:
    endpoints: base URLs, "http://host:port"; all of them serve the same.
    token_env: name of the environment variable that holds the bearer token; empty sends none.
    deadline: seconds for a request, all its tries and waits together.
    attempts: tries of a request at most.
    pause: seconds before the second try, doubled before each further one; drawn from the upper half.
    concurrency: requests under way at once.
    failures_to_open: failures in a row after which an endpoint is left alone.
    open_seconds: for so long.
    max_reply_bytes: a longer reply is refused.
  """

  endpoints: tuple[str, ...]
  token_env: str = ""
  deadline: float = 60.0
  attempts: int = 4
  pause: float = 0.5
  concurrency: int = 8
  failures_to_open: int = 5
  open_seconds: float = 10.0
  max_reply_bytes: int = 2**24

  def __post_init__(self):
    if not self.endpoints:
      raise ValueError(
        "reward.endpoints must name at least one service, for example http://localhost:8000"
      )
    for number, url in enumerate(self.endpoints):
      # what is wrong is not shown: it may be a key
      parts = urllib.parse.urlsplit(url)
      if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(
          f"reward.endpoints[{number}] must be http://HOST[:PORT] or https://HOST[:PORT]"
        )
      if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(
          f"reward.endpoints[{number}] must hold no key; give it in the environment"
        )
    for name in ("deadline", "pause", "open_seconds"):
      if not getattr(self, name) > 0:
        raise ValueError(
          f"reward.{name} must be above 0; got {getattr(self, name)}"
        )
    for name in ("attempts", "concurrency", "failures_to_open"):
      if getattr(self, name) < 1:
        raise ValueError(
          f"reward.{name} must be at least 1; got {getattr(self, name)}"
        )
    if self.token_env and not os.environ.get(self.token_env):
      raise ValueError(
        "reward.token_env must name a variable of the environment that is set"
      )

  @property
  def headers(self) -> dict[str, str]:
    """The headers that carry the token."""
    return (
      {"Authorization": f"Bearer {os.environ[self.token_env]}"}
      if self.token_env
      else {}
    )


class _Endpoint:
  """One service: what is under way there, and whether it is left alone."""

  def __init__(self, url: str):
    self.url = url.rstrip("/")
    self.outstanding = 0
    self.failures = 0  # in a row
    self.open_until = 0.0
    self.probing = False

  def available(self, now: float) -> bool:
    return now >= self.open_until and not self.probing

  def start(self, failures_to_open: int) -> "_Turn":
    self.outstanding += 1
    self.probing = self.failures >= failures_to_open
    return _Turn(self, self.probing)


@dataclasses.dataclass(frozen=True)
class _Turn:
  """A request's turn at an endpoint; `probe` if it tries out one that was left alone."""

  endpoint: _Endpoint
  probe: bool

  def finish(self, worked: bool | None, now: float, settings: Settings):
    """Books how it went: None says neither good nor bad of the endpoint, it was only busy."""
    endpoint = self.endpoint
    endpoint.outstanding -= 1
    if self.probe:
      endpoint.probing = False
    if worked is not None:
      endpoint.failures = 0 if worked else endpoint.failures + 1
    if worked is False and endpoint.failures >= settings.failures_to_open:
      endpoint.open_until = now + settings.open_seconds


@dataclasses.dataclass(frozen=True)
class _Reply:
  """How one try ended.

  Attributes:
    parsed: what the parser made of the body, where `reason` is empty.
    reason: why there is nothing.
    refused: the service works and refuses the request.
    busy: seconds after which the service wants to be asked again; None if it was not busy.
  """

  parsed: object = None
  reason: str = ""
  refused: bool = False
  busy: float | None = None


class _Deadline(threading.local):
  """When this thread's request must be over."""

  end = float("inf")

  def left(self) -> float:
    """Returns the seconds that are left; raises where there are none."""
    left = self.end - time.monotonic()
    if left <= 0:
      raise httpcore.ReadTimeout("the deadline has passed")
    return left


class _Stream(httpcore.NetworkStream):
  """A connection whose every read and write ends at the deadline."""

  def __init__(self, stream: httpcore.NetworkStream, deadline: _Deadline):
    self._stream, self._deadline = stream, deadline

  def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
    return self._stream.read(max_bytes, self._deadline.left())

  def write(self, buffer: bytes, timeout: float | None = None):
    for start in range(0, len(buffer), 2**16):
      self._stream.write(buffer[start : start + 2**16], self._deadline.left())

  def close(self):
    self._stream.close()

  def start_tls(
    self, ssl_context, server_hostname=None, timeout=None
  ) -> "_Stream":
    return _Stream(
      self._stream.start_tls(
        ssl_context, server_hostname, self._deadline.left()
      ),
      self._deadline,
    )

  def get_extra_info(self, info: str):
    return self._stream.get_extra_info(info)


class _Network(httpcore.NetworkBackend):
  """Opens such connections."""

  def __init__(self, deadline: _Deadline):
    self._inner, self._deadline = httpcore.SyncBackend(), deadline

  def connect_tcp(
    self, host, port, timeout=None, local_address=None, socket_options=None
  ) -> _Stream:
    left = self._deadline.left()
    return _Stream(
      self._inner.connect_tcp(host, port, left, local_address, socket_options),
      self._deadline,
    )


class _Meter:
  """Counts since the last reading."""

  def __init__(self):
    self.counts = {"requests": 0, "failed": 0, "retries": 0}
    self.seconds: list[float] = []
    self.most_waiting = 0


class Client:
  """Talks to the endpoints of a service; safe to use from many threads."""

  def __init__(self, settings: Settings):
    self.settings = settings
    self._endpoints = [_Endpoint(url) for url in settings.endpoints]
    # notified when an endpoint has answered or failed
    self._lock = threading.Condition()
    self._meter, self._waiting = _Meter(), 0
    # the first failure since anything worked
    self._failing_since: float | None = None
    self._random = random.Random()  # for pauses only: no result depends on it
    self._pool = futures.ThreadPoolExecutor(settings.concurrency, "reward")
    # httpcore alone, which httpx stands on: only there can a deadline hold for every read. It follows no
    # redirects, decodes no contents and knows no proxies of the environment.
    self._deadline = _Deadline()
    self._http = httpcore.ConnectionPool(
      max_connections=None,
      max_keepalive_connections=settings.concurrency,
      network_backend=_Network(self._deadline),
    )

  def map(self, call: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Returns call(item) of all items, `concurrency` at a time."""
    with self._lock:
      self._waiting += len(items)
      self._meter.most_waiting = max(self._meter.most_waiting, self._waiting)

    def counted(item: T) -> R:
      try:
        return call(item)
      finally:
        with self._lock:
          self._waiting -= 1

    return list(self._pool.map(counted, items))

  def ask_each(
    self, path: str, parse: Callable[[bytes], R]
  ) -> dict[str, R | RequestFailed]:
    """Returns what every endpoint answers to one GET, by URL."""
    found = {}
    for endpoint in self._endpoints:
      with self._lock:
        turn = endpoint.start(self.settings.failures_to_open)
      end = time.monotonic() + self.settings.deadline
      reply = self._try(
        turn, "GET", path, None, self.settings.headers, parse, end
      )
      found[endpoint.url] = (
        RequestFailed(reply.reason, reply.refused)
        if reply.reason
        else reply.parsed
      )
    return found

  def post(
    self,
    path: str,
    content: bytes,
    content_type: str,
    parse: Callable[[bytes], R],
  ) -> R:
    """Sends a request and returns what `parse` makes of the reply's body.

    Raises:
      RequestFailed: after all tries, at the deadline, or at once where the service refuses (4xx).
    """
    return self._request(
      "POST", path, content, {"Content-Type": content_type}, parse
    )

  def _request(
    self, method: str, path: str, content: bytes | None, headers: dict, parse
  ):
    start = time.monotonic()
    try:
      found = self._try_all(
        method, path, content, headers | self.settings.headers, parse, start
      )
    except RequestFailed:
      self._count(failed=1)
      raise
    finally:
      with self._lock:
        self._meter.counts["requests"] += 1
        self._meter.seconds.append(time.monotonic() - start)
    return found

  def _try_all(self, method, path, content, headers, parse, start: float):
    settings, end, failures, reason = (
      self.settings,
      start + self.settings.deadline,
      0,
      "",
    )
    while failures < settings.attempts:
      turn = self._take(end)
      if turn is None:
        reason = (
          reason
          or "every endpoint has failed repeatedly and is left alone for a while"
        )
        break
      reply = self._try(turn, method, path, content, headers, parse, end)
      if not reply.reason:
        return reply.parsed
      reason = reply.reason
      if reply.refused:
        raise RequestFailed(reason, refused=True)
      failures += reply.busy is None
      pause = (
        settings.pause
        * 2 ** max(failures - 1, 0)
        * self._random.uniform(0.5, 1)
      )
      pause = max(pause, reply.busy or 0.0)
      if failures == settings.attempts or time.monotonic() + pause >= end:
        break
      time.sleep(pause)
      self._count(retries=1)
    raise RequestFailed(reason)

  def _try(
    self, turn: _Turn, method, path, content, headers, parse, end: float
  ) -> _Reply:
    """Sends the request once."""
    worked: bool | None = False
    try:
      status, sent, body = self._exchange(
        method, turn.endpoint.url + path, content, headers, end
      )
      # without, it is a proxy whose service is down
      if status == 429 or status == 503 and "retry-after" in sent:
        worked = None
        return _Reply(
          reason=f"the service answered with status {status}",
          busy=_retry_after(sent),
        )
      # a service that refuses is not broken
      worked = status == 200 or 400 <= status < 500 and status != 408
      if status != 200:
        return _Reply(
          reason=f"the service answered with status {status}", refused=worked
        )
      worked = False  # until the reply makes sense
      parsed, worked = parse(body), True
      return _Reply(parsed)
    except httpcore.TimeoutException as error:
      return _Reply(reason=f"no reply in time ({type(error).__name__})")
    except (
      httpcore.NetworkError,
      httpcore.ProtocolError,
      httpcore.UnsupportedProtocol,
    ) as error:
      return _Reply(
        reason=f"no connection or a broken one ({type(error).__name__})"
      )
    except BadReply as error:
      return _Reply(reason=f"a reply that is not of the protocol: {error}")
    finally:
      self._finish(turn, worked)

  def _finish(self, turn: _Turn, worked: bool | None):
    with self._lock:
      now = time.monotonic()
      turn.finish(worked, now, self.settings)
      if worked:
        self._failing_since = None
      elif worked is False and self._failing_since is None:
        self._failing_since = now
      self._lock.notify_all()

  def _exchange(
    self, method, url, content, headers, end: float
  ) -> tuple[int, dict[str, str], bytes]:
    """Returns status, headers and body; raises where the body is too long or late."""
    self._deadline.end = end
    headers = {"Accept-Encoding": "identity"} | headers
    with self._http.stream(
      method, url, headers=headers, content=content
    ) as reply:
      sent = {
        name.decode("latin-1").lower(): value.decode("latin-1")
        for name, value in reply.headers
      }
      if sent.get("content-encoding", "identity") != "identity":
        raise BadReply("it is compressed, which was not asked for")
      chunks, size = [], 0
      for chunk in reply.iter_stream():
        chunks.append(chunk)
        size += len(chunk)
        if size > self.settings.max_reply_bytes:
          raise BadReply(f"longer than {self.settings.max_reply_bytes} bytes")
      return reply.status, sent, b"".join(chunks)

  def _take(self, end: float) -> _Turn | None:
    """Books the available endpoint with the fewest requests under way, waiting for one until `end`.

    Returns None if there is none by then, or none has worked for a whole deadline.
    """
    with self._lock:
      while (now := time.monotonic()) < end:
        free = [
          endpoint for endpoint in self._endpoints if endpoint.available(now)
        ]
        if free:
          return min(free, key=lambda one: one.outstanding).start(
            self.settings.failures_to_open
          )
        probing = any(endpoint.probing for endpoint in self._endpoints)
        if (
          not probing
          and self._failing_since is not None
          and now - self._failing_since > self.settings.deadline
        ):
          return None
        opening = [
          endpoint.open_until
          for endpoint in self._endpoints
          if not endpoint.probing
        ]
        self._lock.wait(max(min([end, *opening]) - now, 1e-3))
      return None

  def _count(self, **more: int):
    with self._lock:
      for name, number in more.items():
        self._meter.counts[name] += number

  def metrics(self) -> dict[str, float]:
    """Returns what happened since the last call.

    requests, failed, retries: counts. failure_rate: failed / requests. p50_seconds, p99_seconds: of
    requests, tries and pauses included. queue: most requests that waited or were under way at once.
    endpoints_open: services left alone now. Rates and seconds are missing where there was no request.
    """
    with self._lock:
      meter, self._meter = self._meter, _Meter()
      now = time.monotonic()
      left_alone = sum(
        now < endpoint.open_until for endpoint in self._endpoints
      )
    found = {name: float(count) for name, count in meter.counts.items()}
    found |= {
      "queue": float(meter.most_waiting),
      "endpoints_open": float(left_alone),
    }
    if meter.seconds:
      p50, p99 = np.quantile(meter.seconds, [0.5, 0.99])
      found |= {"p50_seconds": float(p50), "p99_seconds": float(p99)}
      found["failure_rate"] = found["failed"] / found["requests"]
    return found


def _retry_after(headers: dict[str, str]) -> float:
  """Returns the seconds of a Retry-After header; 0 where there is none that is a number."""
  text = headers.get("retry-after", "")
  return float(text) if text.isdecimal() and len(text) < 6 else 0.0

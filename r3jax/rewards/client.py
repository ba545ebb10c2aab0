"""The one HTTP client under all reward services: routing, deadlines, retries, circuit breaking.

A request goes to the endpoint with the fewest requests under way. An endpoint that fails several
times in a row is left alone for a while, then tried with a single request, for which the others
wait. What can go right the
next time (no connection, a timeout, 429, 5xx, a reply that makes no sense) is tried again, after a
pause that doubles and is drawn at random; all tries share one deadline.

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

import httpx
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
    deadline: seconds for a request, all its tries together. A reply that arrives in drops may take
      up to twice as long.
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
      raise ValueError("reward.endpoints must name at least one service, for example http://localhost:8000")
    for url in self.endpoints:
      parts = urllib.parse.urlsplit(url)
      if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"an endpoint must be http://HOST[:PORT] or https://...; got {parts.hostname or url!r}")
      if parts.username or parts.password or parts.query:
        raise ValueError(f"an endpoint must hold no key; give it in the environment (endpoint at {parts.hostname})")
    for name in ("deadline", "pause", "open_seconds"):
      if not getattr(self, name) > 0:
        raise ValueError(f"reward.{name} must be above 0; got {getattr(self, name)}")
    for name in ("attempts", "concurrency", "failures_to_open"):
      if getattr(self, name) < 1:
        raise ValueError(f"reward.{name} must be at least 1; got {getattr(self, name)}")
    if self.token_env and not os.environ.get(self.token_env):
      raise ValueError(f"reward.token_env names {self.token_env}, which is not set in the environment")

  @property
  def headers(self) -> dict[str, str]:
    """The headers that carry the token."""
    return {"Authorization": f"Bearer {os.environ[self.token_env]}"} if self.token_env else {}


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

  def start(self, failures_to_open: int):
    self.outstanding += 1
    self.probing = self.failures >= failures_to_open

  def finish(self, worked: bool, now: float, settings: Settings):
    self.outstanding -= 1
    self.probing = False
    self.failures = 0 if worked else self.failures + 1
    if self.failures >= settings.failures_to_open:
      self.open_until = now + settings.open_seconds


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
    self._lock = threading.Condition()  # notified when an endpoint has answered or failed
    self._meter, self._waiting = _Meter(), 0
    self._random = random.Random()  # for pauses only: no result depends on it
    self._pool = futures.ThreadPoolExecutor(settings.concurrency, "reward")
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=settings.concurrency)
    # Services are spoken to directly: no proxy or .netrc of the environment.
    self._http = httpx.Client(limits=limits, trust_env=False)

  def close(self):
    """Ends the connections."""
    self._pool.shutdown(cancel_futures=True)
    self._http.close()

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

  def ask_each(self, path: str, parse: Callable[[bytes], R]) -> dict[str, R | RequestFailed]:
    """Returns what every endpoint answers to one GET, by URL."""
    found = {}
    for endpoint in self._endpoints:
      with self._lock:
        endpoint.start(self.settings.failures_to_open)
      reply, reason, refused = self._try(
          endpoint, "GET", path, None, self.settings.headers, parse, self.settings.deadline
      )
      found[endpoint.url] = RequestFailed(reason, refused) if reason else reply
    return found

  def post(self, path: str, content: bytes, content_type: str, parse: Callable[[bytes], R]) -> R:
    """Sends a request and returns what `parse` makes of the reply's body.

    Raises:
      RequestFailed: after all tries, at the deadline, or at once where the service refuses (4xx).
    """
    return self._request("POST", path, content, {"Content-Type": content_type}, parse)

  def _request(self, method: str, path: str, content: bytes | None, headers: dict, parse):
    start = time.monotonic()
    try:
      found = self._try_all(method, path, content, headers | self.settings.headers, parse, start)
    except RequestFailed:
      self._count(failed=1)
      raise
    finally:
      with self._lock:
        self._meter.counts["requests"] += 1
        self._meter.seconds.append(time.monotonic() - start)
    return found

  def _try_all(self, method, path, content, headers, parse, start: float):
    settings, reason, refused = self.settings, "", False
    for attempt in range(settings.attempts):
      if attempt:
        pause = settings.pause * 2 ** (attempt - 1) * self._random.uniform(0.5, 1)
        if time.monotonic() - start + pause >= settings.deadline:
          break
        time.sleep(pause)
        self._count(retries=1)
      endpoint = self._take(start + settings.deadline)
      if endpoint is None:
        reason = reason or "every endpoint has failed repeatedly and is left alone for a while"
        continue
      left = settings.deadline - (time.monotonic() - start)
      reply, reason, refused = self._try(endpoint, method, path, content, headers, parse, left)
      if not reason:
        return reply
      if refused:
        break
    raise RequestFailed(reason, refused)

  def _try(self, endpoint: _Endpoint, method, path, content, headers, parse, left: float):
    """Returns (parsed reply, "", False), or (None, reason, whether the service refused)."""
    worked = refused = False
    reason, found = "", None
    try:
      status, body = self._exchange(method, endpoint.url + path, content, headers, left)
      refused = 400 <= status < 500 and status not in (408, 429)
      if status == 200:
        found = parse(body)
      else:
        reason = f"the service answered with status {status}"
      worked = status == 200 or refused  # a service that refuses is not broken
    except httpx.TimeoutException as error:
      reason = f"no reply in time ({type(error).__name__})"
    except httpx.HTTPError as error:
      reason = f"no connection or a broken one ({type(error).__name__})"
    except BadReply as error:
      reason = f"a reply that is not of the protocol: {error}"
    finally:
      with self._lock:
        endpoint.finish(worked, time.monotonic(), self.settings)
        self._lock.notify_all()
    return found, reason, refused

  def _exchange(self, method, url, content, headers, left: float) -> tuple[int, bytes]:
    """Returns status and body; raises where the body is too long or late."""
    end = time.monotonic() + left
    with self._http.stream(method, url, content=content, headers=headers, timeout=left) as reply:
      chunks, size = [], 0
      for chunk in reply.iter_bytes():
        chunks.append(chunk)
        size += len(chunk)
        if size > self.settings.max_reply_bytes:
          raise BadReply(f"longer than {self.settings.max_reply_bytes} bytes")
        if time.monotonic() > end:
          raise httpx.ReadTimeout("the deadline has passed")
      return reply.status_code, b"".join(chunks)

  def _take(self, end: float) -> _Endpoint | None:
    """Books the available endpoint with the fewest requests under way.

    Returns None if all are left alone, or if one is being tried again and that is not over at `end`.
    """
    with self._lock:
      while True:
        now = time.monotonic()
        free = [endpoint for endpoint in self._endpoints if endpoint.available(now)]
        if free:
          endpoint = min(free, key=lambda one: one.outstanding)
          endpoint.start(self.settings.failures_to_open)
          return endpoint
        if now >= end or not any(endpoint.probing for endpoint in self._endpoints):
          return None
        self._lock.wait(end - now)

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
      left_alone = sum(now < endpoint.open_until for endpoint in self._endpoints)
    found = {name: float(count) for name, count in meter.counts.items()}
    found |= {"queue": float(meter.most_waiting), "endpoints_open": float(left_alone)}
    if meter.seconds:
      p50, p99 = np.quantile(meter.seconds, [0.5, 0.99])
      found |= {"p50_seconds": float(p50), "p99_seconds": float(p99)}
      found["failure_rate"] = found["failed"] / found["requests"]
    return found

"""The one HTTP client under all reward services: routing, deadlines, retries, circuit breaking.

A request goes to the endpoint with the fewest requests under way. An endpoint that fails several
times in a row is left alone for a while, then tried with a single request, for which the others
wait. A failure that may not repeat (no connection, a timeout, status 5xx, a reply that makes no
sense) is tried again, after a pause that doubles and is drawn at random. A busy service (status
429, or 503 with Retry-After) is asked again when it says so. All tries of a request share one
deadline, which holds for every read and write of the connection. When no endpoint has worked for a
whole deadline, requests fail at once, except for those that try an endpoint again. What a service
says of an error is part of the failure's text.

Keys come from the environment and are never written to a message, log or config; where a reply
repeats one, it is replaced by ***.
"""

from collections.abc import Callable, Sequence
from concurrent import futures
import dataclasses
import json
import os
import random
import re
import threading
import time
from typing import TypeVar
import urllib.parse

import httpcore
import numpy as np

from r3jax.files import bounded
from r3jax.files import texts

T = TypeVar("T")
R = TypeVar("R")


# Characters of a service's own words in the text of a failure.
_MAX_MESSAGE = 500
# Where servers put these words: OpenAI's protocol, FastAPI, others.
_MESSAGE_KEYS = ("error", "detail", "message")


class RequestFailed(Exception):
  """A request got no usable reply; the text says why, for the log.

  Attributes:
    refused: whether the service works and refused the request (status 4xx).
    code: the name of the error in OpenAI's protocol, for example "content_filter"; "" without one.
  """

  def __init__(self, reason: str, refused: bool = False, code: str = ""):
    super().__init__(texts.shorten(reason))
    self.refused = refused
    self.code = code


class BadReply(Exception):
  """Raised by a parser: the reply breaks the protocol. The request is tried again."""


@dataclasses.dataclass(frozen=True)
class ClientSettings:
  """How services are called: the config's `reward.client`, `endpoints` and `token_env`.

  Attributes:
    endpoints: base URLs, "http://host:port" or "http://host:port/v1"; all of them serve the same.
    token_env: name of the environment variable that holds the bearer token; "" sends none.
    deadline: seconds for a request, all its tries and pauses together.
    attempts: the highest number of tries of a request.
    pause: seconds before the second try, doubled before each further one; the actual pause is drawn
      from the upper half.
    concurrency: the number of requests under way at once.
    failures_to_open: failures in a row after which an endpoint is left alone.
    open_seconds: for so many seconds.
    max_reply_bytes: a longer reply is refused.
  """

  endpoints: tuple[str, ...]
  token_env: str
  deadline: float
  attempts: int
  pause: float
  concurrency: int
  failures_to_open: int
  open_seconds: float
  max_reply_bytes: int = 2**24

  def __post_init__(self):
    if not self.endpoints:
      raise ValueError(
        "reward.endpoints must name at least one service, for example http://localhost:8000"
      )
    for number, url in enumerate(self.endpoints):
      _check_url(f"reward.endpoints[{number}]", url)
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
  def token(self) -> str:
    """The bearer token; "" without one."""
    return os.environ[self.token_env] if self.token_env else ""

  @property
  def headers(self) -> dict[str, str]:
    """The headers that carry the token."""
    if not self.token:
      return {}
    return {"Authorization": f"Bearer {self.token}"}


def _check_url(key: str, url: str) -> None:
  """Checks an endpoint's URL; the messages do not show it, because it may hold a key.

  Raises:
    ValueError: it is no HTTP URL, or holds a user, a password, a query or a fragment.
  """
  parts = urllib.parse.urlsplit(url)
  if parts.scheme not in ("http", "https") or not parts.hostname:
    raise ValueError(f"{key} must be http://HOST[:PORT] or https://HOST[:PORT]")
  if parts.username or parts.password or parts.query or parts.fragment:
    raise ValueError(f"{key} must hold no key; give it in the environment")


class _Endpoint:
  """One service: how many requests are under way there, and whether it is left alone."""

  def __init__(self, url: str):
    self.url = url.rstrip("/")
    self.outstanding = 0
    self.failures = 0  # in a row
    self.open_until = 0.0
    self.probing = False

  def available(self, now: float) -> bool:
    """Returns whether a request may be sent there now."""
    return now >= self.open_until and not self.probing

  def start(self, failures_to_open: int) -> "_Slot":
    """Takes a slot; after so many failures in a row the request is a probe."""
    self.outstanding += 1
    self.probing = self.failures >= failures_to_open
    return _Slot(self, self.probing)


@dataclasses.dataclass(frozen=True)
class _Slot:
  """A request's place at an endpoint.

  Attributes:
    endpoint: where the request is sent.
    probe: whether it tries out an endpoint that was left alone.
  """

  endpoint: _Endpoint
  probe: bool

  def finish(
    self, worked: bool | None, now: float, settings: ClientSettings
  ) -> None:
    """Updates the endpoint; a busy one (None) has neither worked nor failed."""
    endpoint = self.endpoint
    endpoint.outstanding -= 1
    if self.probe:
      endpoint.probing = False
    if worked is not None:
      endpoint.failures = 0 if worked else endpoint.failures + 1
    if worked is False and endpoint.failures >= settings.failures_to_open:
      endpoint.open_until = now + settings.open_seconds


@dataclasses.dataclass(frozen=True)
class _Request:
  """What is sent, and how its reply is read.

  Attributes:
    method: "GET" or "POST".
    path: the path behind the endpoint's URL.
    content: the body, if there is one.
    headers: all headers of the request.
    parse: reads the reply's body.
  """

  method: str
  path: str
  content: bytes | None
  headers: dict[str, str]
  parse: Callable[[bytes], object]


@dataclasses.dataclass(frozen=True)
class _Attempt:
  """The result of one try.

  Attributes:
    parsed: the parser's value of the body, where `reason` is empty.
    reason: why there is no value.
    refused: whether the service works and refuses the request.
    code: see `RequestFailed`.
    busy: seconds after which the service wants to be asked again; None if it was not busy.
  """

  parsed: object = None
  reason: str = ""
  refused: bool = False
  code: str = ""
  busy: float | None = None

  def failure(self) -> RequestFailed:
    """Returns the error of a request that ends with this try."""
    return RequestFailed(self.reason, self.refused, self.code)


class _Deadline(threading.local):
  """When the request of this thread must be finished."""

  end = float("inf")

  def remaining(self) -> float:
    """Returns the seconds until the deadline; raises where it has passed."""
    remaining = self.end - time.monotonic()
    if remaining <= 0:
      raise httpcore.ReadTimeout("the deadline has passed")
    return remaining


class _Stream(httpcore.NetworkStream):
  """A connection whose every read and write ends at the deadline.

  httpcore's own timeouts are ignored: each of them would start anew with every read.
  """

  def __init__(self, stream: httpcore.NetworkStream, deadline: _Deadline):
    self._stream = stream
    self._deadline = deadline

  def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
    """Reads until the deadline."""
    return self._stream.read(max_bytes, self._deadline.remaining())

  def write(self, buffer: bytes, timeout: float | None = None) -> None:
    """Writes until the deadline."""
    # In chunks, so that a slow receiver cannot hold one write beyond the deadline.
    for start in range(0, len(buffer), 2**16):
      chunk = buffer[start : start + 2**16]
      self._stream.write(chunk, self._deadline.remaining())

  def close(self) -> None:
    """Closes the connection."""
    self._stream.close()

  def start_tls(
    self, ssl_context, server_hostname=None, timeout=None
  ) -> "_Stream":
    """Returns the encrypted connection, with the same deadline."""
    stream = self._stream.start_tls(
      ssl_context, server_hostname, self._deadline.remaining()
    )
    return _Stream(stream, self._deadline)

  def get_extra_info(self, info: str):
    """Returns what the connection says of itself."""
    return self._stream.get_extra_info(info)


class _Network(httpcore.NetworkBackend):
  """Opens connections that end at the deadline."""

  def __init__(self, deadline: _Deadline):
    self._backend = httpcore.SyncBackend()
    self._deadline = deadline

  def connect_tcp(
    self, host, port, timeout=None, local_address=None, socket_options=None
  ) -> _Stream:
    """Connects until the deadline."""
    stream = self._backend.connect_tcp(
      host, port, self._deadline.remaining(), local_address, socket_options
    )
    return _Stream(stream, self._deadline)


class _Meter:
  """Counts of requests since the last reading."""

  def __init__(self):
    self.counts = {"requests": 0, "failed": 0, "retries": 0}
    self.seconds: list[float] = []
    self.most_waiting = 0


class Client:
  """Talks to the endpoints of a service; safe to use from many threads."""

  def __init__(self, settings: ClientSettings):
    """Creates the client; it connects with the first request."""
    self.settings = settings
    self._endpoints = [_Endpoint(url) for url in settings.endpoints]
    # Notified when an endpoint has answered or failed; it guards all fields below.
    self._lock = threading.Condition()
    self._meter = _Meter()
    self._waiting = 0
    # When the first request failed since the last one that worked.
    self._failing_since: float | None = None
    self._last_failure = ""
    # For pauses only: no result depends on it.
    self._random = random.Random()
    self._pool = futures.ThreadPoolExecutor(settings.concurrency, "reward")
    # httpcore, on which httpx is built: only there can a deadline hold for every read. It follows
    # no redirects, decodes no contents and knows no proxies of the environment.
    self._deadline = _Deadline()
    self._redact = _redactor(settings.token)
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
    """Returns every endpoint's answer to one GET, by URL."""
    request = _Request("GET", path, None, self.settings.headers, parse)
    answers = {}
    for endpoint in self._endpoints:
      with self._lock:
        slot = endpoint.start(self.settings.failures_to_open)
      end = time.monotonic() + self.settings.deadline
      attempt = self._try(request, slot, end)
      answers[endpoint.url] = attempt.parsed
      if attempt.reason:
        answers[endpoint.url] = attempt.failure()
    return answers

  def post(
    self,
    path: str,
    content: bytes,
    content_type: str,
    parse: Callable[[bytes], R],
  ) -> R:
    """Sends a request and returns `parse` of the reply's body.

    Raises:
      RequestFailed: after all tries, at the deadline, or at once where the service refuses (4xx).
    """
    headers = {"Content-Type": content_type} | self.settings.headers
    request = _Request("POST", path, content, headers, parse)
    start = time.monotonic()
    try:
      return self._try_all(request, start + self.settings.deadline)
    except RequestFailed:
      self._count(failed=1)
      raise
    finally:
      with self._lock:
        self._meter.counts["requests"] += 1
        self._meter.seconds.append(time.monotonic() - start)

  def _try_all(self, request: _Request, end: float):
    """Tries a request until it works, may not be tried again, or must be finished.

    Raises:
      RequestFailed: there is no usable reply.
    """
    settings = self.settings
    failures = 0
    reason = ""
    while failures < settings.attempts:
      slot = self._take_slot(end)
      if slot is None:
        reason = reason or self._left_alone_text()
        break
      attempt = self._try(request, slot, end)
      if not attempt.reason:
        return attempt.parsed
      reason = attempt.reason
      self._last_failure = reason
      if attempt.refused:
        raise attempt.failure()
      # A busy service has not failed: only the deadline limits how often it is asked.
      failures += attempt.busy is None
      # Pauses at random keep many clients from coming back at the same moment.
      doublings = max(failures - 1, 0)
      pause = settings.pause * 2**doublings * self._random.uniform(0.5, 1)
      pause = max(pause, attempt.busy or 0.0)
      if failures == settings.attempts or time.monotonic() + pause >= end:
        break
      time.sleep(pause)
      self._count(retries=1)
    raise RequestFailed(reason)

  def _left_alone_text(self) -> str:
    """Returns why a request was not sent."""
    text = "every endpoint has failed repeatedly and is left alone for a while"
    if self._last_failure:
      text += f"; the last failure: {self._last_failure}"
    return text

  def _try(self, request: _Request, slot: _Slot, end: float) -> _Attempt:
    """Sends the request once."""
    # Whether the endpoint works; None says neither, because it was only busy.
    worked: bool | None = False
    try:
      status, headers, body = self._exchange(request, slot.endpoint.url, end)
      # A 503 without Retry-After comes from a proxy whose service is down.
      if status == 429 or status == 503 and "retry-after" in headers:
        worked = None
        reason = self._error_text(status, body)
        return _Attempt(reason=reason, busy=_retry_after(headers))
      if status != 200:
        # A service that refuses is not broken.
        worked = 400 <= status < 500 and status != 408
        reason = self._error_text(status, body)
        return _Attempt(reason=reason, refused=worked, code=_error_code(body))
      parsed = request.parse(body)
      worked = True
      return _Attempt(parsed)
    except httpcore.TimeoutException as error:
      return _Attempt(reason=f"no reply in time ({type(error).__name__})")
    except (
      httpcore.NetworkError,
      httpcore.ProtocolError,
      httpcore.UnsupportedProtocol,
    ) as error:
      return _Attempt(
        reason=f"no connection or a broken one ({type(error).__name__})"
      )
    except BadReply as error:
      return _Attempt(reason=f"a reply that is not of the protocol: {error}")
    finally:
      self._finish(slot, worked)

  def _error_text(self, status: int, body: bytes) -> str:
    """Returns the status of a reply and what the service says."""
    text = f"the service answered with status {status}"
    message = texts.shorten(error_message(body), _MAX_MESSAGE)
    return f"{text}: {message}" if message else text

  def _finish(self, slot: _Slot, worked: bool | None) -> None:
    """Gives the slot back, and wakes the requests that wait for one."""
    with self._lock:
      now = time.monotonic()
      slot.finish(worked, now, self.settings)
      if worked:
        self._failing_since = None
      elif worked is False and self._failing_since is None:
        self._failing_since = now
      self._lock.notify_all()

  def _exchange(
    self, request: _Request, url: str, end: float
  ) -> tuple[int, dict[str, str], bytes]:
    """Returns status, headers and body; raises where the body is too long or late."""
    self._deadline.end = end
    exchange = self._http.stream(
      request.method,
      _address(url, request.path),
      headers={"Accept-Encoding": "identity"} | request.headers,
      content=request.content,
    )
    with exchange as reply:
      headers = {
        name.decode("latin-1").lower(): value.decode("latin-1")
        for name, value in reply.headers
      }
      if headers.get("content-encoding", "identity") != "identity":
        raise BadReply("it is compressed, which was not asked for")
      chunks = []
      size = 0
      for chunk in reply.iter_stream():
        chunks.append(chunk)
        size += len(chunk)
        if size > self.settings.max_reply_bytes:
          raise BadReply(f"longer than {self.settings.max_reply_bytes} bytes")
      # Some services repeat the key that they refuse, or the whole request.
      return reply.status, headers, self._redact(b"".join(chunks))

  def _take_slot(self, end: float) -> _Slot | None:
    """Takes a slot at the available endpoint with the fewest requests, waiting for one until `end`.

    Returns None if there is none by then, or none has worked for a whole deadline.
    """
    with self._lock:
      while (now := time.monotonic()) < end:
        available = [
          endpoint for endpoint in self._endpoints if endpoint.available(now)
        ]
        if available:
          endpoint = min(available, key=lambda endpoint: endpoint.outstanding)
          return endpoint.start(self.settings.failures_to_open)
        if self._is_hopeless(now):
          return None
        # Wait until an endpoint answers, or the first that is left alone may be tried again.
        openings = [
          endpoint.open_until
          for endpoint in self._endpoints
          if not endpoint.probing
        ]
        self._lock.wait(max(min([end, *openings]) - now, 1e-3))
      return None

  def _is_hopeless(self, now: float) -> bool:
    """Returns whether no endpoint has worked for a whole deadline and none is being tried."""
    if self._failing_since is None:
      return False
    if any(endpoint.probing for endpoint in self._endpoints):
      return False
    return now - self._failing_since > self.settings.deadline

  def _count(self, **increments: int) -> None:
    with self._lock:
      for name, increment in increments.items():
        self._meter.counts[name] += increment

  def metrics(self) -> dict[str, float]:
    """Returns the numbers since the last call.

    requests, failed, retries: counts. failure_rate: failed / requests. p50_seconds, p99_seconds:
    quantiles of the seconds of requests, tries and pauses included. queue: the highest number of
    requests that waited or were under way at once. endpoints_open: services left alone now. Rates
    and seconds are missing where there was no request.
    """
    with self._lock:
      meter = self._meter
      self._meter = _Meter()
      now = time.monotonic()
      left_alone = sum(
        now < endpoint.open_until for endpoint in self._endpoints
      )
    metrics = {name: float(count) for name, count in meter.counts.items()}
    metrics["queue"] = float(meter.most_waiting)
    metrics["endpoints_open"] = float(left_alone)
    if meter.seconds:
      p50, p99 = np.quantile(meter.seconds, [0.5, 0.99])
      metrics["p50_seconds"] = float(p50)
      metrics["p99_seconds"] = float(p99)
      metrics["failure_rate"] = metrics["failed"] / metrics["requests"]
    return metrics


def _redactor(token: str) -> Callable[[bytes], bytes]:
  r"""Returns a function that writes *** in place of a token in the body of a reply.

  It is replaced before anything is parsed, so that no message, log or file can hold it. JSON and
  pickles may write a character as an escape, such as \u0061 for "a".

  Args:
    token: "" for none.
  """
  spellings = []
  for character in token:
    escaped = "".join(
      f"[{digit}{digit.upper()}]" for digit in f"{ord(character):04x}"
    )
    spellings.append(rf"(?:\\?{re.escape(character)}|\\u{escaped})".encode())
  pattern = re.compile(b"".join(spellings))

  def redact(body: bytes) -> bytes:
    return pattern.sub(b"***", body) if token else body

  return redact


def _address(url: str, path: str) -> str:
  """Returns the URL of a path; people write a base URL both with and without "/v1"."""
  if path.startswith("/v1/"):
    url = url.removesuffix("/v1")
  return url + path


def _json_or_text(body: bytes) -> object:
  """Returns the JSON value of a body, or its text where it is none."""
  text = body.decode(errors="replace")
  try:
    return bounded.parse_json(text, bounded.MESSAGE_LIMITS)
  except ValueError:
    return text


def error_message(body: bytes) -> str:
  """Returns what a service says of an error, in one line; "" where it says nothing.

  Args:
    body: {"error": {"message": TEXT}}, {"error": TEXT}, {"detail": ...}, {"message": TEXT}, or any
      text.
  """
  message = _json_or_text(body)
  for key in _MESSAGE_KEYS:
    if isinstance(message, dict) and key in message:
      message = message[key]
  text = message if isinstance(message, str) else json.dumps(message)
  # Control characters could change what a terminal shows.
  printable = "".join(c if c.isprintable() else " " for c in text)
  return " ".join(printable.split())


def _error_code(body: bytes) -> str:
  """Returns the code of {"error": {"code": TEXT}}, "" without one."""
  message = _json_or_text(body)
  error = message.get("error") if isinstance(message, dict) else None
  code = error.get("code") if isinstance(error, dict) else None
  return code if isinstance(code, str) else ""


def _retry_after(headers: dict[str, str]) -> float:
  """Returns the seconds of a Retry-After header; 0 where it is missing or no number."""
  text = headers.get("retry-after", "")
  return float(text) if text.isdecimal() and len(text) < 6 else 0.0

"""Serves a reward over HTTP, in the protocol of `remote/protocol.py`.

The standard library's server is enough: one route, a few clients, and no further dependency.
Requests are scored one after the other. A bounded number of them waits; further ones get status
429 and are tried again by the client. A server that drains answers new requests with 503, finishes
those under way, and ends.
"""

import collections
from collections.abc import Mapping
import contextlib
import dataclasses
import hmac
import http.server
import io
import json
import socket
import sys
import threading
import time

from absl import logging
import numpy as np

from r3jax.data import records
from r3jax.rewards import outcome
from r3jax.rewards.remote import protocol

# Bytes of a body that are read at once.
_CHUNK = 2**16
# A longer Content-Length is no size of a body.
_MAX_LENGTH_DIGITS = 18
_TOO_MANY_CONNECTIONS = (
  b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 1\r\n"
  b"Content-Length: 0\r\nConnection: close\r\n\r\n"
)
# `Server.statistics` covers so many requests.
_MAX_LOGGED_REQUESTS = 100_000


@dataclasses.dataclass(frozen=True)
class Limits:
  """What a request may ask for.

  Attributes:
    max_body_bytes: the size of a request.
    max_items: images of a request.
    max_pixels: pixels of an image, checked before it is decoded.
    max_request_pixels: pixels of all images of a request.
    queue: requests that wait while another is scored.
    idle_seconds: a silent connection is closed after so many seconds, and so is one whose request,
      headers and body together, has not arrived so many seconds after its first byte.
    max_connections: connections at a time; further ones get status 429.
    max_connections_per_client: the same, of one address.
  """

  max_body_bytes: int = 2**26
  max_items: int = 256
  max_pixels: int = 2**22
  max_request_pixels: int = 2**26
  queue: int = 32
  idle_seconds: float = 60.0
  max_connections: int = 1024
  max_connections_per_client: int = 256


DEFAULT_LIMITS = Limits()


@dataclasses.dataclass(frozen=True)
class _Scored:
  """A request that was answered.

  Attributes:
    start, end: monotonic seconds.
    num_images: images of the request.
  """

  start: float
  end: float
  num_images: int


class Server(http.server.ThreadingHTTPServer):
  """A reward at an address; `serve_forever` until `drain` has ended it."""

  daemon_threads = True  # an idle connection must not keep the process alive
  request_queue_size = 128  # connections that wait to be taken

  def __init__(
    self,
    address: tuple[str, int],
    reward: outcome.HostReward,
    token: str = "",
    limits: Limits = DEFAULT_LIMITS,
  ):
    """Binds the address.

    Args:
      address: (host, port); port 0 takes a free one.
      reward: scores the images.
      token: the bearer token that clients must send; "" lets everyone in.
      limits: what a request may ask for.
    """
    super().__init__(address, _Handler)
    self.reward = reward
    self.token = token
    self.limits = limits
    self.draining = False
    self._slots = threading.BoundedSemaphore(limits.queue + 1)
    self._scoring = threading.Lock()
    # Notified when `_num_answering` changes.
    self._changed = threading.Condition()
    self._num_answering = 0
    self._identity = protocol.identity(reward.describe())
    self._connections: collections.Counter[str] = collections.Counter()
    self._connections_lock = threading.Lock()
    self._scored: collections.deque[_Scored] = collections.deque(
      maxlen=_MAX_LOGGED_REQUESTS
    )

  def verify_request(self, request, client_address) -> bool:
    """Counts a new connection; returns whether it may stay, see `Limits.max_connections`."""
    host = client_address[0]
    limits = self.limits
    with self._connections_lock:
      is_too_many = (
        self._connections.total() >= limits.max_connections
        or self._connections[host] >= limits.max_connections_per_client
      )
      if not is_too_many:
        self._connections[host] += 1
        return True
    logging.log_every_n_seconds(
      logging.WARNING, "too many connections, the last from %s", 10, host
    )
    # So few bytes fit into the connection's buffer: this does not wait for the client.
    with contextlib.suppress(OSError):
      request.settimeout(1.0)
      request.sendall(_TOO_MANY_CONNECTIONS)
    return False

  def process_request(self, request, client_address) -> None:
    """Serves a connection in a thread of its own; see `socketserver`."""
    try:
      super().process_request(request, client_address)
    except RuntimeError:  # no thread can be started
      self._forget_connection(client_address[0])
      raise

  def process_request_thread(self, request, client_address) -> None:
    """Serves a connection, then counts it out."""
    try:
      super().process_request_thread(request, client_address)
    finally:
      self._forget_connection(client_address[0])

  def _forget_connection(self, host: str) -> None:
    with self._connections_lock:
      self._connections[host] -= 1
      if not self._connections[host]:
        del self._connections[host]

  def handle_error(self, request, client_address) -> None:
    """Logs an error; a client that is gone is none to speak of."""
    if isinstance(sys.exception(), OSError):
      logging.debug("%s is gone", client_address[0], exc_info=True)
    else:
      logging.exception("a connection from %s failed", client_address[0])

  def admit(self) -> bool:
    """Takes a slot in the queue; returns whether there was one."""
    return not self.draining and self._slots.acquire(blocking=False)

  def leave(self) -> None:
    """Gives the slot back."""
    self._slots.release()

  def count_answering(self, change: int) -> None:
    """Changes the number of requests that are being answered, by which `drain` waits for them."""
    with self._changed:
      self._num_answering += change
      self._changed.notify_all()

  def reply(self, request_id: str, items: list[protocol.Item]) -> bytes:
    """Returns the answer to a request."""
    start = time.monotonic()
    # Decoding is inside the lock, too: only one request's images are in memory at a time.
    with self._scoring:
      results = self.score(items)
    self._scored.append(_Scored(start, time.monotonic(), len(items)))
    return protocol.make_reply(request_id, results, self._identity)

  def score(self, items: list[protocol.Item]) -> list[outcome.Outcome]:
    """Returns the outcomes of items; where an image or a record cannot be read it is `Invalid`."""
    results: dict[int, outcome.Outcome] = {}
    images: dict[int, np.ndarray] = {}
    prompts: dict[int, records.Prompt] = {}
    # Images of one size go to the reward together.
    rows_by_shape: dict[tuple, list[int]] = {}
    remaining_pixels = self.limits.max_request_pixels
    for row, item in enumerate(items):
      max_pixels = min(self.limits.max_pixels, remaining_pixels)
      try:
        image = protocol.decode_image(item.image, item.format, max_pixels)
      except protocol.ProtocolError as error:
        results[row] = outcome.Invalid(str(error))
        continue
      # Many small files may hold as many pixels as one large one.
      remaining_pixels -= image.shape[0] * image.shape[1]
      try:
        prompts[row] = records.Prompt.from_json(
          item.record, "the record cannot be judged"
        )
      except ValueError as error:
        results[row] = outcome.Invalid(str(error))
        continue
      images[row] = image
      rows_by_shape.setdefault(image.shape, []).append(row)
    for rows in rows_by_shape.values():
      scored = self.reward.score(
        np.stack([images[row] for row in rows]), [prompts[row] for row in rows]
      )
      results.update(zip(rows, scored, strict=True))
    return [results[row] for row in range(len(items))]

  def statistics(self) -> str:
    """Returns a line for the log: requests, images, images per second, seconds per request."""
    scored = list(self._scored)
    if not scored:
      return "no requests"
    seconds = [request.end - request.start for request in scored]
    p50, p99 = np.quantile(seconds, [0.5, 0.99])
    num_images = sum(request.num_images for request in scored)
    first_start = min(request.start for request in scored)
    last_end = max(request.end for request in scored)
    rate = num_images / max(last_end - first_start, 1e-9)
    return (
      f"{len(scored)} requests, {num_images} images, {rate:.1f} images/s, "
      f"seconds per request p50 {p50:.3f} p99 {p99:.3f}"
    )

  def drain(self, seconds: float) -> None:
    """Refuses new requests, waits up to `seconds` for those under way, then ends `serve_forever`.

    Not to be called by the thread that serves.
    """
    self.draining = True
    logging.info("draining: %s", self.statistics())
    with self._changed:
      self._changed.wait_for(lambda: not self._num_answering, seconds)
    self.shutdown()


class _TimedReader(io.RawIOBase):
  """Reads a connection; a request must have arrived whole in time, however slowly it is sent."""

  def __init__(self, connection: socket.socket, seconds: float):
    super().__init__()
    self._connection = connection
    self._seconds = seconds
    self._end: float | None = None

  def await_request(self) -> None:
    """Lets the time of the next request begin with its first byte."""
    self._end = None

  def remaining(self) -> float:
    """Returns the seconds that are left for the request; raises TimeoutError after them."""
    if self._end is None:
      return self._seconds
    remaining = self._end - time.monotonic()
    if remaining <= 0:
      raise TimeoutError("the request is too slow")
    return remaining

  def readable(self) -> bool:
    """See `io.RawIOBase`."""
    return True

  def readinto(self, buffer) -> int:
    """Reads what has arrived; see `io.RawIOBase`."""
    self._connection.settimeout(self.remaining())
    size = self._connection.recv_into(buffer)
    # Writing an answer has the whole time again.
    self._connection.settimeout(self._seconds)
    if self._end is None:
      self._end = time.monotonic() + self._seconds
    return size


class _Handler(http.server.BaseHTTPRequestHandler):
  """Answers one connection's requests."""

  server: Server
  protocol_version = "HTTP/1.1"
  server_version = "r3jax"
  sys_version = ""

  def setup(self) -> None:
    """Prepares a connection that ends when it is silent for too long."""
    self.timeout = self.server.limits.idle_seconds
    super().setup()
    self.rfile.close()
    self._reader = _TimedReader(self.connection, self.timeout)
    self.rfile = io.BufferedReader(self._reader, _CHUNK)

  def handle_one_request(self) -> None:
    """Answers the next request of the connection, see `_TimedReader`."""
    self._reader.await_request()
    super().handle_one_request()

  def log_message(self, format: str, *args) -> None:
    """Writes the standard library's line for a request to the debug log."""
    logging.debug("%s " + format, self.address_string(), *args)

  def do_GET(self) -> None:
    """Answers GET /health."""
    if self.path != protocol.HEALTH_PATH:
      return self._refuse(404, f"only {protocol.HEALTH_PATH} answers GET")
    if not self._is_allowed():
      return self._refuse(401, "a bearer token is needed")
    body = protocol.make_health(self.server.reward, self.server.draining)
    return self._send(200, body)

  def do_POST(self) -> None:
    """Answers POST /v1/score."""
    self.server.count_answering(+1)
    try:
      self._answer_post()
    finally:
      self.server.count_answering(-1)

  def _answer_post(self) -> None:
    # All of this comes before the body is read, so that the queue bounds what is held in memory.
    if self.path != protocol.SCORE_PATH:
      return self._turn_away(404, f"only {protocol.SCORE_PATH} answers POST")
    if not self._is_allowed():
      return self._turn_away(401, "a bearer token is needed")
    if not self.server.admit():
      return self._turn_away(503 if self.server.draining else 429, "busy")
    try:
      body = self._read_body()
      if body is not None:
        self._score(body)
    finally:
      self.server.leave()

  def _score(self, body: bytes) -> None:
    """Answers a request with outcomes, or refuses it."""
    try:
      request_id, items = protocol.read_request(body)
    except protocol.ProtocolError as error:
      return self._refuse(400, str(error))
    max_items = self.server.limits.max_items
    if len(items) > max_items:
      return self._refuse(413, f"at most {max_items} items; got {len(items)}")
    try:
      reply = self.server.reply(request_id, items)
    except Exception:
      # The reward may raise anything: the client gets an error, and the next request may succeed.
      logging.exception("the reward failed")
      return self._refuse(500, "the reward failed, see the server's log")
    return self._send(200, reply)

  def _read_body(self) -> bytes | None:
    """Returns the request's body.

    Returns None where the request was turned away, because its length is unknown or too large, or
    the connection has ended.

    Raises:
      TimeoutError: it arrived too late; `handle_one_request` closes the connection.
    """
    limits = self.server.limits
    lengths = self.headers.get_all("Content-Length", [])
    # Where another server stands in between, the two must not disagree on where a request ends.
    is_ambiguous = "Transfer-Encoding" in self.headers or len(lengths) > 1
    length = "".join(lengths)
    is_size = length.isdecimal() and len(length) <= _MAX_LENGTH_DIGITS
    if is_ambiguous or not is_size:
      return self._turn_away(
        411, "one Content-Length is needed, and nothing else"
      )
    if int(length) > limits.max_body_bytes:
      return self._turn_away(
        413, f"at most {limits.max_body_bytes} bytes; got {length}"
      )
    chunks = []
    remaining = int(length)
    while remaining:
      chunk = self.rfile.read1(min(remaining, _CHUNK))
      if not chunk:
        self.close_connection = True
        return None
      chunks.append(chunk)
      remaining -= len(chunk)
    return b"".join(chunks)

  def _is_allowed(self) -> bool:
    """Returns whether the request carries the server's token, if there is one."""
    if not self.server.token:
      return True
    authorization = self.headers.get("Authorization", "").encode()
    expected = f"Bearer {self.server.token}".encode()
    return hmac.compare_digest(authorization, expected)

  def _turn_away(self, status: int, reason: str) -> None:
    """Refuses a request whose body has not been read, and closes the connection."""
    self.close_connection = True
    self._refuse(status, reason)

  def _refuse(self, status: int, reason: str) -> None:
    """Answers with an error."""
    headers = {"Retry-After": "1"} if status in (429, 503) else {}
    message = {"protocol": protocol.VERSION, "error": reason}
    self._send(status, json.dumps(message).encode(), headers)

  def _send(
    self, status: int, body: bytes, headers: Mapping[str, str] | None = None
  ) -> None:
    """Answers with a JSON body."""
    self.send_response(status)
    self.send_header("Content-Type", "application/json")
    self.send_header("Content-Length", str(len(body)))
    for name, value in (headers or {}).items():
      self.send_header(name, value)
    if self.close_connection:
      self.send_header("Connection", "close")
    self.end_headers()
    self.wfile.write(body)

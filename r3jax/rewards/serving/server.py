"""Serves a reward over HTTP, in the protocol of `protocol.py`.

The standard library's server is enough: one route, a few clients, and no further dependency.
Requests are scored one after the other; a bounded number waits, further ones are told to come back
(429). When the server is to end it says so (503), finishes what it has, and goes.
"""

import collections
import dataclasses
import hmac
import http.server
import json
import threading
import time

from absl import logging
import numpy as np

from r3jax.rewards import outcome as outcome_lib
from r3jax.rewards.remote import protocol

_CHUNK = 2**16


@dataclasses.dataclass(frozen=True)
class Limits:
  """What a request may ask for.

  Attributes:
    max_body_bytes: of a request.
    max_items: images of a request.
    max_pixels: of an image, checked before it is decoded.
    max_request_pixels: of all images of a request.
    queue: requests that wait while another is scored.
    idle_seconds: after which a silent connection is closed, and one whose request has not arrived.
  """

  max_body_bytes: int = 2**26
  max_items: int = 256
  max_pixels: int = 2**22
  max_request_pixels: int = 2**26
  queue: int = 32
  idle_seconds: float = 60.0


class Server(http.server.ThreadingHTTPServer):
  """A reward at an address; `serve_forever` until `drain` has ended it."""

  daemon_threads = True  # an idle connection must not keep the process alive
  request_queue_size = 128  # connections that wait to be taken

  def __init__(
    self,
    address: tuple[str, int],
    reward: outcome_lib.HostReward,
    token: str = "",
    limits: Limits = Limits(),
  ):
    """Binds the address, (host, port); port 0 takes a free one. An empty token lets everyone in."""
    super().__init__(address, _Handler)
    self.reward, self.token, self.limits = reward, token, limits
    self.draining = False
    self._places = threading.BoundedSemaphore(limits.queue + 1)
    self._scoring = threading.Lock()
    self._changed = threading.Condition()
    self._under_way = 0
    self._identity = protocol.identity(reward.describe())
    # (start, end, images) of the latest
    self._requests = collections.deque(maxlen=100_000)

  def admit(self) -> bool:
    """Takes a place in the queue; tells if there was one."""
    return not self.draining and self._places.acquire(blocking=False)

  def leave(self):
    """Gives the place back."""
    self._places.release()

  def answering(self, change: int):
    """Counts the requests that are being answered."""
    with self._changed:
      self._under_way += change
      self._changed.notify_all()

  def reply(self, request_id: str, items: list[dict]) -> bytes:
    """Returns the answer to a request."""
    start = time.monotonic()
    # around decoding too: the images of one request are in memory at a time
    with self._scoring:
      outcomes = self.score(items)
    self._requests.append((start, time.monotonic(), len(items)))
    return protocol.make_reply(request_id, outcomes, self._identity)

  def score(self, items: list[dict]) -> list[outcome_lib.Outcome]:
    """Returns the outcomes of a request's items; an image that cannot be read is invalid."""
    images = self._decoded(items)
    outcomes = [
      outcome_lib.Invalid(image) if isinstance(image, str) else None
      for image in images
    ]
    # Images of one size go to the reward together.
    by_shape: dict[tuple, list[int]] = {}
    for row, image in enumerate(images):
      if not isinstance(image, str):
        by_shape.setdefault(image.shape, []).append(row)
    for rows in by_shape.values():
      found = self.reward.score(
        np.stack([images[row] for row in rows]),
        [items[row]["record"] for row in rows],
      )
      for row, outcome in zip(rows, found, strict=True):
        outcomes[row] = outcome
    return outcomes

  def _decoded(self, items: list[dict]) -> list[np.ndarray | str]:
    """Returns every image, or what is wrong with it."""
    found, left = [], self.limits.max_request_pixels
    for item in items:
      try:
        image = protocol.decode_image(
          item["image"], item["format"], min(self.limits.max_pixels, left)
        )
        left -= image.shape[0] * image.shape[1]
        found.append(image)
      except protocol.ProtocolError as error:
        found.append(str(error))
    return found

  def statistics(self) -> str:
    """Returns a line for the log: requests, images, images per second, seconds per request."""
    requests = list(self._requests)
    if not requests:
      return "no requests"
    starts, ends, images = np.array(requests).T
    p50, p99 = np.quantile(ends - starts, [0.5, 0.99])
    rate = images.sum() / max(ends.max() - starts.min(), 1e-9)
    return (
      f"{len(requests)} requests, {int(images.sum())} images, {rate:.1f} images/s, "
      f"seconds per request p50 {p50:.3f} p99 {p99:.3f}"
    )

  def drain(self, seconds: float):
    """Refuses new work, waits up to `seconds` for what is under way, then ends `serve_forever`.

    Not to be called by the thread that serves.
    """
    self.draining = True
    logging.info("draining: %s", self.statistics())
    with self._changed:
      self._changed.wait_for(lambda: not self._under_way, seconds)
    self.shutdown()


class _Handler(http.server.BaseHTTPRequestHandler):
  """Answers one connection's requests."""

  server: Server
  protocol_version = "HTTP/1.1"
  server_version, sys_version = "r3jax", ""

  def setup(self):
    self.timeout = self.server.limits.idle_seconds
    super().setup()

  def log_message(self, format: str, *args):
    logging.debug("%s " + format, self.address_string(), *args)

  def do_GET(self):
    if self.path != protocol.HEALTH_PATH:
      return self._refuse(404, f"GET {protocol.HEALTH_PATH} is all there is")
    if not self._is_allowed():
      return self._refuse(401, "a bearer token is needed")
    return self._send(
      200, protocol.make_health(self.server.reward, self.server.draining)
    )

  def do_POST(self):
    self.server.answering(+1)
    try:
      self._post()
    finally:
      self.server.answering(-1)

  def _post(self):
    # All of this before the body is read: what waits in memory is bounded by the queue.
    if self.path != protocol.SCORE_PATH:
      return self._turn_away(404, f"POST {protocol.SCORE_PATH} is all there is")
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

  def _score(self, body: bytes):
    try:
      request_id, items = protocol.read_request(body)
    except protocol.ProtocolError as error:
      return self._refuse(400, str(error))
    if len(items) > self.server.limits.max_items:
      return self._refuse(
        413, f"at most {self.server.limits.max_items} items; got {len(items)}"
      )
    try:
      reply = self.server.reply(request_id, items)
    except Exception:
      # whatever the reward raises: the client is told, and the next request may go well
      logging.exception("the reward failed")
      return self._refuse(500, "the reward failed, see the server's log")
    return self._send(200, reply)

  def _read_body(self) -> bytes | None:
    """Returns the request's body; None after turning away one that is too long, late or of unknown length."""
    length, limits = self.headers.get("Content-Length", ""), self.server.limits
    if not length.isdecimal() or len(length) > 18:
      return self._turn_away(411, "Content-Length is needed")
    if int(length) > limits.max_body_bytes:
      return self._turn_away(
        413, f"at most {limits.max_body_bytes} bytes; got {length}"
      )
    end, chunks, left = time.monotonic() + limits.idle_seconds, [], int(length)
    while left:
      chunk = self.rfile.read1(min(left, _CHUNK))
      if not chunk or time.monotonic() > end:
        self.close_connection = True
        return None
      chunks.append(chunk)
      left -= len(chunk)
    return b"".join(chunks)

  def _is_allowed(self) -> bool:
    if not self.server.token:
      return True
    given = self.headers.get("Authorization", "").encode()
    return hmac.compare_digest(given, f"Bearer {self.server.token}".encode())

  def _turn_away(self, status: int, reason: str) -> None:
    """Refuses a request whose body is still on the line, and closes the connection."""
    self.close_connection = True
    self._refuse(status, reason)

  def _refuse(self, status: int, reason: str) -> None:
    headers = {"Retry-After": "1"} if status in (429, 503) else {}
    self._send(
      status,
      json.dumps({"protocol": protocol.VERSION, "error": reason}).encode(),
      headers,
    )

  def _send(
    self, status: int, body: bytes, headers: dict[str, str] | None = None
  ):
    self.send_response(status)
    for name, value in (
      {"Content-Type": "application/json", "Content-Length": str(len(body))}
      | (headers or {})
    ).items():
      self.send_header(name, value)
    if self.close_connection:
      self.send_header("Connection", "close")
    self.end_headers()
    self.wfile.write(body)

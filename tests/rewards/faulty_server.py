"""A reward server that misbehaves on demand, in a process of its own.

  python tests/rewards/faulty_server.py PORT

speaks the JSON protocol for the embedded world's verifier. `POST /fault/NAME` makes it behave as
NAME from then on; "none" makes it well again. `GET /count` tells how many requests it has got.
"""

import contextlib
import json
import os
import pickle
import socket
import struct
import sys
import threading
import time

from r3jax.rewards.remote import protocol
from r3jax.rewards.serving import local
from r3jax.rewards.serving import server as server_lib
from r3jax.worlds.shapes import world

FAULTS = (
  "none",
  "error500",
  "timeout",
  "dropped",
  "slow",
  "garbage",
  "html",
  "pickle",
  "missing",
  "excess",
  "out_of_range",
)


class _Bomb:
  """Makes a file when it is unpickled."""

  def __init__(self, path: str):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (self.path,)


class FaultyServer(server_lib.Server):
  """The server with a fault; `share` of the requests show it."""

  def __init__(self, address, reward, bomb: str):
    super().__init__(address, reward)
    self.RequestHandlerClass = _FaultyHandler
    self.fault, self.share, self.count, self.bomb = "none", 1.0, 0, bomb
    self.lock = threading.Lock()


class _FaultyHandler(server_lib._Handler):
  def do_GET(self):
    if self.path == "/count":
      return self._send(200, json.dumps(self.server.count).encode())
    return super().do_GET()

  def do_POST(self):
    if self.path.startswith("/fault/"):
      _, _, name, share = self.path.split("/")
      self.server.fault, self.server.share = name, float(share)
      return self._send(200, b"{}")
    with self.server.lock:
      self.server.count += 1
      number = self.server.count
    # evenly spread over the requests
    faulty = number * self.server.share % 1 < self.server.share
    fault = self.server.fault if faulty else "none"
    if fault in ("none", "slow"):
      time.sleep(0.3 if fault == "slow" else 0)
      return super().do_POST()
    body = self._read_body()
    if fault == "dropped":
      # Resets the connection in place of an answer.
      self.connection.setsockopt(
        socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
      )
      self.close_connection = True
      self.connection.close()
      return None
    if fault == "timeout":
      time.sleep(5)
    return self._send(*self._wrong_answer(fault, body))

  def _wrong_answer(self, fault: str, body: bytes) -> tuple[int, bytes]:
    request_id, items = protocol.read_request(body)
    if fault in ("missing", "excess", "out_of_range"):
      reply = json.loads(self.server.reply(request_id, items))
      outcomes = reply["outcomes"]
      changed = {
        "missing": outcomes[:-1],
        "excess": outcomes + outcomes[:1],
        "out_of_range": [outcome | {"score": 14.0} for outcome in outcomes],
      }
      return 200, json.dumps(reply | {"outcomes": changed[fault]}).encode()
    return {
      "error500": (500, b"Traceback (most recent call last): ..."),
      "timeout": (200, b""),
      "garbage": (200, b'{"protocol": 1, "outcomes": [{"sta'),
      "html": (200, b"<html><body>502 Bad Gateway</body></html>"),
      "pickle": (200, pickle.dumps(_Bomb(self.server.bomb))),
    }[fault]

  def handle(self):
    # The client went away, or the connection was dropped on purpose.
    with contextlib.suppress(OSError):
      super().handle()


if __name__ == "__main__":
  server = FaultyServer(
    ("127.0.0.1", int(sys.argv[1])), local.Verifier(world.WORLD), sys.argv[2]
  )
  print("ready", flush=True)
  server.serve_forever(poll_interval=0.05)

"""An HTTP server in a thread that answers as a function says, and remembers what it was asked."""

from collections.abc import Callable
import contextlib
import dataclasses
import http.server
import threading

# status, body, further headers
Answer = tuple[int, bytes] | tuple[int, bytes, dict[str, str]]


@dataclasses.dataclass
class Request:
  """One request as it came in."""

  method: str
  path: str
  headers: dict
  body: bytes


class Scripted:
  """The server's address and its requests so far."""

  def __init__(self, url: str):
    self.url, self.requests = url, []
    self.under_way = self.most_under_way = 0


@contextlib.contextmanager
def serve(answer: Callable[[Request], Answer | None], port: int = 0):
  """Serves at a port; where the answer is None the connection is closed without one."""
  lock = threading.Lock()

  class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _handle(self):
      body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
      request = Request(self.command, self.path, dict(self.headers), body)
      with lock:
        state.requests.append(request)
        state.under_way += 1
        state.most_under_way = max(state.most_under_way, state.under_way)
      try:
        found = answer(request)
      finally:
        with lock:
          state.under_way -= 1
      if found is None:
        self.close_connection = True
        return
      self.send_response(found[0])
      self.send_header("Content-Length", str(len(found[1])))
      for header in (found[2] if len(found) > 2 else {}).items():
        self.send_header(*header)
      self.end_headers()
      self.wfile.write(found[1])

    do_GET = do_POST = _handle

    def log_message(self, *args):
      pass

    def handle(self):
      with contextlib.suppress(OSError):  # the client went away
        super().handle()

  server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
  server.daemon_threads = True
  state = Scripted(f"http://127.0.0.1:{server.server_address[1]}")
  thread = threading.Thread(target=server.serve_forever, args=(0.02,))
  thread.start()
  try:
    yield state
  finally:
    server.shutdown()
    thread.join()
    server.server_close()

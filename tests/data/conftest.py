"""A web server for the tests of what is downloaded."""

import dataclasses
import functools
import http.server
import pathlib
import threading

import pytest


@dataclasses.dataclass
class Site:
  """A folder that is served over HTTP.

  Attributes:
    folder: what is served.
    url: where.
    requests: the paths asked for so far.
  """

  folder: pathlib.Path
  url: str
  requests: list[str]


class Handler(http.server.SimpleHTTPRequestHandler):
  """Serves files and notes what was asked for."""

  def __init__(self, *args, requests, **kwargs):
    self.requests = requests
    super().__init__(*args, **kwargs)

  def do_GET(self):
    self.requests.append(self.path)
    super().do_GET()

  def log_message(self, *args):
    pass


@pytest.fixture
def site(tmp_path):
  """A `Site` of an empty folder."""
  folder, requests = tmp_path / "site", []
  folder.mkdir()
  handler = functools.partial(Handler, directory=str(folder), requests=requests)
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
    thread = threading.Thread(
      target=server.serve_forever, kwargs={"poll_interval": 0.02}
    )
    thread.start()
    yield Site(folder, f"http://127.0.0.1:{server.server_port}", requests)
    server.shutdown()
    thread.join()

"""Reads prompt files from paths and URLs; what a URL gave once cannot change unnoticed.

TFDS's own download manager checks only checksums that stand in the source code of a dataset; of a
URL that a user names it would take whatever it gives.
"""

import hashlib
import json
import pathlib
import re

from etils import epath
import httpx

from r3jax.data import storage
from r3jax.files import atomic

TIMEOUT_S = 60.0
_PIN = re.compile(r"sha256=([0-9a-fA-F]{64})")


def read(source: str, downloads: pathlib.Path) -> bytes:
  """Returns the content of a source.

  A URL is downloaded once and kept with a note of its size and SHA-256; what is downloaded again,
  because the kept file is gone or damaged, must be the same.

  Args:
    source: a path that etils.epath opens, or an http(s) URL, to which "#sha256=" and 64 hex digits
      may be added: the content must have this hash, whatever the note says. It goes into configs
      and notes, so it must hold no user, password or query.
    downloads: the folder of downloads.

  Raises:
    ValueError: if the hash is malformed or is not that of the content, or the URL may hold a key.
    OSError: if the source cannot be read.
  """
  if not source.startswith(("http://", "https://")):
    return epath.Path(source).read_bytes()
  url, pinned = _split(source)
  folder = downloads / storage.folder_name(url)
  kept, note = folder / "content", folder / "note.json"
  with storage.locked(folder):
    recorded = json.loads(note.read_text())["sha256"] if note.exists() else None
    expected = pinned or recorded
    if kept.exists() and _sha256(content := kept.read_bytes()) == expected:
      return content
    content = _download(url)
    if expected and _sha256(content) != expected:
      raise ValueError(
        _refusal(url, expected, content, None if pinned else note)
      )
    atomic.write_text(
      note,
      json.dumps(
        {"url": url, "size": len(content), "sha256": _sha256(content)}
      ),
    )
    # Last: a note without its content only means a new download.
    kept.write_bytes(content)
    return content


def _split(source: str) -> tuple[str, str | None]:
  """Returns the URL and the hash it must have, if one is given."""
  url, _, fragment = source.partition("#")
  before, _, host = url.split("/")[2].rpartition("@")
  if before or "?" in url:  # neither is shown
    raise ValueError(
      "a URL of prompts must hold no user, password or query, for they could be keys; got one at "
      f"{host.partition('?')[0]}. Download the file and give its path"
    )
  if not fragment:
    return url, None
  pin = _PIN.fullmatch(fragment)
  if not pin:
    raise ValueError(
      f"a URL may end in #sha256= and 64 hex digits, got #{fragment} ({url})"
    )
  return url, pin[1].lower()


def _download(url: str) -> bytes:
  try:
    response = httpx.get(url, follow_redirects=True, timeout=TIMEOUT_S)
  except (httpx.HTTPError, httpx.InvalidURL) as error:
    raise OSError(f"{url} must be reachable: {error}") from error
  if response.status_code != 200:
    raise OSError(
      f"{url} must answer with status 200, got {response.status_code}"
    )
  return response.content


def _refusal(
  url: str, expected: str, content: bytes, note: pathlib.Path | None
) -> str:
  """Says that a URL's content is not the expected one, and what to do."""
  found = _sha256(content)
  text = f"the content of {url} must have sha256 {expected}, got {found} ({len(content)} bytes)"
  if note is None:
    return text
  return (
    f"{text}. It was {expected} when {note} was written: if the change is wanted, give the "
    f"source as {url}#sha256={found}"
  )


def _sha256(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()

"""Reads prompt files from paths and URLs; a URL whose content has changed is refused.

TFDS's own download manager checks only the checksums in the source code of a dataset; it would
accept any content of a URL that a user names.
"""

import hashlib
import json
import pathlib
import re

from absl import logging
import httpx

from r3jax.data import storage
from r3jax.files import atomic
from r3jax.files import paths

TIMEOUT_S = 60.0
_PIN = re.compile(r"sha256=([0-9a-fA-F]{64})")


def read(source: str, downloads: pathlib.Path | None) -> bytes:
  """Returns the content of a source.

  A URL is downloaded once and stored with a note of its size and SHA-256. If the stored file is
  gone or damaged, it is downloaded again and must be the same.

  Args:
    source: a path that etils.epath opens, or an http(s) URL, to which "#sha256=" and 64 hex digits
      may be added: the content must have this hash, whatever the note says. The URL is written to
      configs and notes, so it must hold no user, password or query.
    downloads: the folder of downloads; None downloads every time and keeps no note.

  Raises:
    ValueError: the hash is malformed or is not that of the content, or the URL may hold a key.
    OSError: the source cannot be read.
  """
  if not source.startswith(("http://", "https://")):
    return paths.of_user(source).read_bytes()
  url, pinned = _split_pin(source)
  if downloads is None:
    content = _download(url)
    if pinned and _sha256(content) != pinned:
      raise ValueError(_refusal(url, pinned, content, None))
    return content
  folder = downloads / storage.folder_name(url)
  stored = folder / "content"
  note = folder / "note.json"
  with storage.locked(folder):
    expected = pinned
    if expected is None and note.exists():
      expected = json.loads(note.read_text())["sha256"]
    if stored.exists():
      content = stored.read_bytes()
      if _sha256(content) == expected:
        return content
    content = _download(url)
    if expected and _sha256(content) != expected:
      raise ValueError(
        _refusal(url, expected, content, None if pinned else note)
      )
    facts = {"url": url, "size": len(content), "sha256": _sha256(content)}
    try:
      atomic.write_text(note, json.dumps(facts))
      # The content is written last: a note without it only means a new download.
      stored.write_bytes(content)
    except OSError as error:  # a full disk
      logging.warning("the content of %s is not kept: %s", url, error)
    return content


def _split_pin(source: str) -> tuple[str, str | None]:
  """Returns the URL, and the hash that its content must have if one is given."""
  url, _, fragment = source.partition("#")
  credentials, _, host = url.split("/")[2].rpartition("@")
  if credentials or "?" in url:
    # The message shows neither of them.
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
  """Returns the error's text: the content of a URL is not the expected one, and what to do."""
  actual = _sha256(content)
  text = f"the content of {url} must have sha256 {expected}, got {actual} ({len(content)} bytes)"
  if note is None:
    return text
  return (
    f"{text}. It was {expected} when {note} was written: if the change is wanted, give the "
    f"source as {url}#sha256={actual}"
  )


def _sha256(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()

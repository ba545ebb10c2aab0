"""Reads prompt files from paths and URLs; a URL whose content has changed is refused.

TFDS's own download manager checks only the checksums in the source code of a dataset; it would
accept any content of a URL that a user names.
"""

import hashlib
import json
import pathlib
import re
import time

from absl import logging
import httpx

from r3jax.data import storage
from r3jax.files import atomic
from r3jax.files import bounded
from r3jax.files import paths

TIMEOUT_S = 60.0  # of a connection and of every read
_MAX_SECONDS = 900.0
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
    ValueError: the hash is malformed or is not that of the content, the URL may hold a key, or the
      source is no regular file or too long.
    OSError: the source cannot be read.
  """
  if not source.startswith(("http://", "https://")):
    return bounded.read_bytes(paths.of_user(source))
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
      expected = bounded.read_json_object(note).get("sha256")
    if stored.exists():
      content = bounded.read_bytes(stored)
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
  """Returns the content of a URL; raises OSError where there is none, or it is endless."""
  end = time.monotonic() + _MAX_SECONDS
  chunks = []
  size = 0
  try:
    with httpx.stream(
      "GET", url, follow_redirects=True, timeout=TIMEOUT_S
    ) as response:
      if response.status_code != 200:
        raise OSError(
          f"{url} must answer with status 200, got {response.status_code}"
        )
      for chunk in response.iter_bytes():
        chunks.append(chunk)
        size += len(chunk)
        if size > bounded.DEFAULT_LIMITS.max_bytes or time.monotonic() > end:
          raise OSError(
            f"{url} must send at most {bounded.DEFAULT_LIMITS.max_bytes} bytes in "
            f"{_MAX_SECONDS:.0f} s"
          )
  except (httpx.HTTPError, httpx.InvalidURL) as error:
    raise OSError(f"{url} must be reachable: {error}") from error
  return b"".join(chunks)


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

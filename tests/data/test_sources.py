"""Tests of data/sources.py."""

import hashlib
import json
import os

import pytest

from r3jax.data import sources
from r3jax.files import bounded

OLD, NEW = b'{"tag": "old"}\n', b'{"tag": "new"}\n'
OLD_HASH, NEW_HASH = (
  hashlib.sha256(content).hexdigest() for content in (OLD, NEW)
)


@pytest.fixture
def url(site):
  """The URL of a file that holds OLD."""
  (site.folder / "prompts.jsonl").write_bytes(OLD)
  return f"{site.url}/prompts.jsonl"


def change(site, content=NEW):
  (site.folder / "prompts.jsonl").write_bytes(content)


def forget(downloads):
  """Removes what was downloaded but not the notes."""
  for kept in downloads.glob("*/content"):
    kept.unlink()


class TestRead:
  def test_path_is_read(self, tmp_path):
    (tmp_path / "x.jsonl").write_bytes(OLD)
    assert (
      sources.read(str(tmp_path / "x.jsonl"), tmp_path / "downloads") == OLD
    )
    assert not (tmp_path / "downloads").exists()

  def test_path_that_does_not_exist_is_refused(self, tmp_path):
    with pytest.raises(FileNotFoundError, match="x.jsonl"):
      sources.read(str(tmp_path / "x.jsonl"), tmp_path)

  @pytest.mark.timeout(20)
  def test_pipe_and_device_are_refused(self, tmp_path):
    os.mkfifo(tmp_path / "x.jsonl")
    for path in (str(tmp_path / "x.jsonl"), "/dev/zero"):
      with pytest.raises(ValueError, match="must be a regular file; it is a"):
        sources.read(path, tmp_path)

  def test_endless_download_is_refused(self, site, url, tmp_path, monkeypatch):
    limits = bounded.Limits(max_bytes=len(OLD) - 1)
    monkeypatch.setattr(bounded, "DEFAULT_LIMITS", limits)
    with pytest.raises(OSError, match="must send at most 14 bytes"):
      sources.read(url, tmp_path)

  def test_url_is_downloaded_once_and_noted(self, site, url, tmp_path):
    downloads = tmp_path / "downloads"
    assert sources.read(url, downloads) == sources.read(url, downloads) == OLD
    assert site.requests == ["/prompts.jsonl"]
    (note,) = downloads.glob("*/note.json")
    assert json.loads(note.read_text()) == {
      "url": url,
      "size": 15,
      "sha256": OLD_HASH,
    }

  def test_same_content_may_be_downloaded_again(self, site, url, tmp_path):
    sources.read(url, tmp_path)
    forget(tmp_path)
    assert sources.read(url, tmp_path) == OLD
    assert len(site.requests) == 2

  def test_damaged_download_is_replaced(self, site, url, tmp_path):
    sources.read(url, tmp_path)
    for kept in tmp_path.glob("*/content"):
      kept.write_bytes(OLD[:3])
    assert sources.read(url, tmp_path) == sources.read(url, tmp_path) == OLD
    assert len(site.requests) == 2

  def test_other_content_is_refused_with_both_hashes(self, site, url, tmp_path):
    sources.read(url, tmp_path)
    forget(tmp_path)
    change(site)
    (note,) = tmp_path.glob("*/note.json")
    with pytest.raises(ValueError) as error:
      sources.read(url, tmp_path)
    assert str(error.value) == (
      f"the content of {url} must have sha256 {OLD_HASH}, got {NEW_HASH} (15 bytes). It was "
      f"{OLD_HASH} when {note} was written: if the change is wanted, give the source as "
      f"{url}#sha256={NEW_HASH}"
    )
    assert json.loads(note.read_text())["sha256"] == OLD_HASH

  def test_other_content_is_taken_with_its_hash_and_from_then_on(
    self, site, url, tmp_path
  ):
    sources.read(url, tmp_path)
    change(site)
    assert sources.read(f"{url}#sha256={NEW_HASH.upper()}", tmp_path) == NEW
    assert sources.read(url, tmp_path) == NEW
    assert len(site.requests) == 2

  def test_content_without_the_given_hash_is_refused(self, url, tmp_path):
    message = f"must have sha256 {NEW_HASH}, got {OLD_HASH} .15 bytes.$"
    with pytest.raises(ValueError, match=message):
      sources.read(f"{url}#sha256={NEW_HASH}", tmp_path)
    assert not list(tmp_path.glob("*/note.json"))

  @pytest.mark.parametrize(
    "end", ["sha256=", "sha256=12", "sha265=" + "0" * 64, "top"]
  )
  def test_malformed_hash_is_refused(self, site, url, tmp_path, end):
    with pytest.raises(
      ValueError, match=f"may end in #sha256= and 64 hex digits, got #{end} "
    ):
      sources.read(f"{url}#{end}", tmp_path)
    assert site.requests == []

  @pytest.mark.parametrize(
    "source",
    [
      "http://reader:SECRET@localhost/p.jsonl",
      "http://SECRET@localhost/p.jsonl",
      "https://localhost/p.jsonl?key=SECRET#sha256=" + 64 * "0",
    ],
  )
  def test_url_that_may_hold_a_key_is_refused_without_showing_it(
    self, tmp_path, source
  ):
    with pytest.raises(
      ValueError, match="could be keys; got one at localhost. Download the file"
    ) as refused:
      sources.read(source, tmp_path)
    assert "SECRET" not in str(refused.value)
    assert not list(tmp_path.iterdir())

  def test_page_that_is_not_there_is_refused(self, site, tmp_path):
    with pytest.raises(
      OSError, match=f"{site.url}/none must answer with status 200, got 404"
    ):
      sources.read(f"{site.url}/none", tmp_path)
    assert not list(tmp_path.glob("*/note.json"))

  @pytest.mark.parametrize(
    "bad", ["http://127.0.0.1:1/x", "http://[/x", "http://"]
  )
  def test_address_that_does_not_answer_is_refused(self, tmp_path, bad):
    with pytest.raises(OSError, match="must be reachable: ") as error:
      sources.read(bad, tmp_path)
    assert str(error.value).startswith(bad)

"""Tests of files/caches.py."""

import os

import pytest

from r3jax.files import caches

NOWHERE = "/proc/r3jax"  # where not even root may make a folder


@pytest.fixture(autouse=True)
def _forget(monkeypatch):
  caches.usable.cache_clear()
  monkeypatch.delenv("R3JAX_DATA", raising=False)
  yield
  caches.usable.cache_clear()


class TestFolder:
  def test_is_in_the_home_unless_a_variable_names_it(
    self, tmp_path, monkeypatch
  ):
    monkeypatch.setenv("HOME", str(tmp_path))
    default = tmp_path / ".cache" / "r3jax" / "compiled"
    assert caches.folder("R3JAX_DATA", "compiled") == default
    assert list(default.iterdir()) == []
    monkeypatch.setenv("R3JAX_DATA", "~/data")
    assert caches.folder("R3JAX_DATA") == tmp_path / "data"

  def test_nothing_is_kept_where_it_cannot_be_written(
    self, monkeypatch, caplog
  ):
    monkeypatch.setenv("R3JAX_DATA", NOWHERE)
    for _ in range(2):
      assert caches.folder("R3JAX_DATA") is None
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith("nothing is kept for the next start: /proc/r3jax")
    assert message.endswith("R3JAX_DATA names another folder")

  def test_folder_that_others_have_filled_may_be_read_only(
    self, tmp_path, monkeypatch
  ):
    def fails(folder):
      raise OSError(30, "Read-only file system", str(folder))

    monkeypatch.setattr(caches.atomic, "check_writable", fails)
    monkeypatch.setenv("R3JAX_DATA", str(tmp_path))
    assert caches.folder("R3JAX_DATA", may_be_read_only=True) == tmp_path
    assert caches.folder("R3JAX_DATA") is None

  def test_nothing_is_kept_without_a_home(self, monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert caches.folder("R3JAX_DATA") is None

"""Tests of files/bounded.py."""

import os
import socket

from etils import epath
import pytest

from r3jax.files import bounded

LIMITS = bounded.Limits(max_bytes=1000, max_levels=4, max_values=50)


class TestReadBytes:
  def test_regular_file_and_object_in_a_store(self, tmp_path, store):
    (tmp_path / "a").write_bytes(b"text")
    epath.Path("gs://bucket/a").write_bytes(b"text")
    for path in (tmp_path / "a", "gs://bucket/a"):
      assert bounded.read_bytes(path) == b"text"
      assert bounded.read_bytes(path, 4) == b"text"
      with pytest.raises(ValueError, match="a must have at most 3 bytes"):
        bounded.read_bytes(path, 3)

  @pytest.mark.timeout(10)
  def test_pipe_is_refused_and_not_waited_for(self, tmp_path):
    os.mkfifo(tmp_path / "a")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for name in ("a", "link"):
      with pytest.raises(ValueError, match=f"{name} must be a regular .* pipe"):
        bounded.read_bytes(tmp_path / name)

  @pytest.mark.timeout(10)
  def test_devices_and_sockets_are_refused(self, tmp_path):
    with pytest.raises(ValueError, match="must be a regular file; .* device"):
      bounded.read_bytes("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
      server.bind(str(tmp_path / "s"))
      with pytest.raises(ValueError, match="must be a regular .* socket"):
        bounded.read_bytes(tmp_path / "s")

  def test_folder_is_named_and_no_descriptor_stays_open(self, tmp_path):
    def lowest_descriptor():
      descriptor = os.open(os.devnull, os.O_RDONLY)
      os.close(descriptor)
      return descriptor

    before = lowest_descriptor()
    with pytest.raises(IsADirectoryError, match=f"'{tmp_path}'"):
      bounded.read_bytes(tmp_path)
    assert lowest_descriptor() == before

  def test_folder_and_missing_file_are_errors_of_the_system(self, tmp_path):
    with pytest.raises(IsADirectoryError):
      bounded.read_bytes(tmp_path)
    with pytest.raises(FileNotFoundError):
      bounded.read_bytes(tmp_path / "x")


class TestCheckLink:
  def test_links_inside_beside_and_in_a_cache_are_followed(self, tmp_path):
    model = tmp_path / "snapshots" / "0123"
    for folder in (model, tmp_path / "blobs", tmp_path / "snapshots" / "b"):
      folder.mkdir(parents=True)
      (folder / "file").write_text("x")
    for number, target in enumerate(
      ("file", "../b/file", "../../blobs/file", "../../blobs/not there yet")
    ):
      (model / str(number)).symlink_to(target)
      bounded.check_link(model / str(number))
    bounded.check_link(model / "file")
    bounded.check_link("gs://bucket/file")

  def test_other_links_are_refused(self, tmp_path):
    model = tmp_path / "a" / "model"
    model.mkdir(parents=True)
    (tmp_path / "secret").write_text("x")
    (model / "first").symlink_to(tmp_path / "secret")
    (model / "second").symlink_to("first")
    (model / "third").symlink_to("/dev/zero")
    for name in ("first", "second", "third"):
      with pytest.raises(ValueError, match=f"{name} must not lead out of its"):
        bounded.check_link(model / name)


class TestParseJson:
  def test_values_come_back(self):
    text = '{"a": [1, 2.5, null, true, "x"], "b": {"c": -12345678901234567890}}'
    value = {
      "a": [1, 2.5, None, True, "x"],
      "b": {"c": -12345678901234567890},
    }
    assert bounded.parse_json(text, LIMITS) == value
    assert bounded.parse_json(text.encode()) == value
    assert bounded.parse_json("[NaN, -Infinity]", allow_nan=True)[1] < 0

  @pytest.mark.parametrize(
    "text, message",
    [
      ("[" * 5 + "]" * 5, "nested at most 4 levels deep"),
      ("[" * 900, "at most 50 values"),
      ('{"a":' * 40, "Expecting value"),
      ("[" + "1," * 60 + "1]", "at most 50 values"),
      ('"' + "x" * 1000 + '"', "at most 1000 characters; got 1002"),
      ("1e999", "must be finite as a float; got 1e999"),
      ("-1e999", "must be finite"),
      ("NaN", "NaN is no JSON number"),
      ("[Infinity]", "Infinity is no JSON number"),
      (b"\xff", "can't decode byte 0xff"),
    ],
  )
  def test_what_exceeds_the_limits_is_refused(self, text, message):
    with pytest.raises(ValueError, match=message):
      bounded.parse_json(text, LIMITS)

  def test_default_limits_hold(self):
    for text, message in (
      ("[" * 10**5 + "]" * 10**5, "at most 50 levels deep"),
      ("9" * 5000, "must be finite as a float; got 999"),
      ("9" * 400, "must be finite as a float; got 999"),
    ):
      with pytest.raises(ValueError, match=message):
        bounded.parse_json(text)

  def test_values_that_share_lists_are_counted_without_end(self):
    value = []
    for _ in range(30):
      value = [value, value]
    limits = bounded.Limits(max_levels=100)
    with pytest.raises(ValueError, match="at most 10000000 values"):
      bounded.check_levels(value, limits)
    circle: list = []
    circle.append(circle)
    with pytest.raises(ValueError, match="at most 50 levels deep"):
      bounded.check_levels(circle, bounded.DEFAULT_LIMITS)


class TestReadJson:
  def test_messages_name_the_file(self, tmp_path):
    path = tmp_path / "a.json"
    for content, message in (
      (b'{"a": ', "a.json must be JSON: Expecting value"),
      (b"[" * 60 + b"]" * 60, "a.json must be JSON: .* levels deep"),
      (b"[1]", "a.json must hold a JSON object; it holds a list"),
      (b"\xff", "a.json must be UTF-8"),
    ):
      path.write_bytes(content)
      with pytest.raises(ValueError, match=message):
        bounded.read_json_object(path)
    path.write_bytes(b'{"a": 1}')
    assert bounded.read_json_object(path) == {"a": 1}

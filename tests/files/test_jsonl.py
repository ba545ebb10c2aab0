"""Tests of io/jsonl.py."""

import errno
import os

from etils import epath
import pytest

from r3jax.files import bounded
from r3jax.files import jsonl


@pytest.fixture
def path(tmp_path):
  return tmp_path / "log.jsonl"


class TestAppend:
  def test_lines_follow_each_other(self, path):
    jsonl.append(path, [{"step": 1}])
    jsonl.append(path, [{"step": 2, "text": "a\nb"}, {"step": 3}])
    assert (
      path.read_text()
      == '{"step": 1}\n{"step": 2, "text": "a\\nb"}\n{"step": 3}\n'
    )

  def test_nan_is_refused(self, path):
    with pytest.raises(ValueError):
      jsonl.append(path, [{"step": 1, "x": float("nan")}])
    assert not path.exists()

  def test_in_a_store_everything_is_written_once(self, store):
    for step in (1, 2, 2, 11):
      jsonl.append(
        "gs://bucket/log.jsonl",
        [{"step": step, "n": 0}, {"step": step, "n": 1}],
      )
    jsonl.append("gs://bucket/log.jsonl", [])
    assert {path: text.decode() for path, text in store.objects.items()} == {
      f"gs://bucket/log.jsonl.parts/{name}.jsonl": (
        f'{{"step": {step}, "n": 0}}\n{{"step": {step}, "n": 1}}\n'
      )
      for name, step in (
        ("00000001.0000", 1),
        ("00000002.0000", 2),
        ("00000002.0001", 2),
        ("00000011.0000", 11),
      )
    }
    assert set(store.writes.values()) == {1}

  def test_in_a_store_steps_are_kept_apart(self, store):
    jsonl.append(
      "gs://bucket/log.jsonl", [{"step": 1}, {"step": 1}, {"step": 2}]
    )
    assert len(store.objects) == 2
    jsonl.drop_after("gs://bucket/log.jsonl", 1)
    assert jsonl.read("gs://bucket/log.jsonl") == [{"step": 1}] * 2


class TestNan:
  def test_line_of_another_writer_is_kept_aside(self, path):
    """The rest can be rewritten, which a resumed run does; JSON has no NaN."""
    path.write_text('{"step": 1, "x": NaN}\n{"step": 2}\n')
    assert jsonl.read(path) == [{"step": 2}]
    jsonl.drop_after(path, 2)
    assert path.read_text() == '{"step": 2}\n'
    assert "NaN" in path.with_name("log.jsonl.damaged").read_text()


class TestDropCutOff:
  def test_leaves_whole_lines(self, path):
    path.write_text('{"step": 1}\n{"st')
    jsonl.drop_cut_off(path)
    assert path.read_text() == '{"step": 1}\n'

  def test_a_full_disk_loses_nothing(self, path, monkeypatch):
    path.write_text('{"step": 1}\n{"st')

    def fill(path, content):
      path.open("wb").close()
      raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(epath.Path(path)), "write_bytes", fill)
    with pytest.raises(OSError, match="No space"):
      jsonl.drop_cut_off(path)
    assert path.read_text() == '{"step": 1}\n{"st'


class TestRead:
  def test_no_file_has_no_objects(self, path):
    assert jsonl.read(path) == []

  def test_line_that_was_cut_off_is_left_out(self, path):
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert jsonl.read(path) == [{"step": 1}, {"step": 2}]

  @pytest.mark.parametrize("folder", ["gs://bucket", "copied"])
  def test_file_and_parts_are_one_log(self, store, tmp_path, folder):
    """A run that was copied from a disk to a store or back, and went on there."""
    folder = epath.Path(folder if "://" in folder else tmp_path / folder)
    parts = folder / "log.jsonl.parts"
    parts.mkdir(parents=True)
    (folder / "log.jsonl").write_text('{"step": 1}\n{"step": 3}\n')
    (parts / "00000002.0001.jsonl").write_text('{"step": 2, "n": 1}\n')
    (parts / "00000002.0000.jsonl").write_text('{"step": 2, "n": 0}\n')
    (parts / "00000004.0000.jsonl").write_text('{"step": 4}\n')
    # What a file browser or a user leaves there is not read.
    for name in (".DS_Store.jsonl", "00000002.0000 (copy).jsonl"):
      (parts / name).write_text("not ours")
    objects = [
      {"step": 1},
      {"step": 2, "n": 0},
      {"step": 2, "n": 1},
      {"step": 3},
      {"step": 4},
    ]
    assert jsonl.read(folder / "log.jsonl") == objects
    jsonl.drop_after(folder / "log.jsonl", 2)
    assert jsonl.read(folder / "log.jsonl") == objects[:3]

  def test_other_bad_lines_are_left_out_with_a_warning(self, path, caplog):
    content = (
      b'{"step": 1\n{"step": 2}\n7\n\xff\n{"step": true}\n\n{"step": 3}\n'
    )
    path.write_bytes(content)
    assert jsonl.read(path) == [{"step": 2}, {"step": 3}]
    assert f"{path}: 5 of 7 lines" in caplog.text
    jsonl.drop_after(path, 2)
    assert path.read_text() == '{"step": 2}\n'
    # Nothing is lost.
    assert path.with_name("log.jsonl.damaged").read_bytes() == content

  def test_what_is_no_file_is_an_error(self, path):
    os.mkfifo(path)
    with pytest.raises(ValueError):
      jsonl.read(path)


class TestDropAfter:
  @pytest.mark.parametrize(
    "step, kept", [(None, []), (0, [0]), (2, [0, 1, 2]), (9, [0, 1, 2, 3])]
  )
  def test_later_steps_go(self, path, step, kept):
    jsonl.append(path, [{"step": step} for step in range(4)])
    jsonl.drop_after(path, step)
    assert [obj["step"] for obj in jsonl.read(path)] == kept
    assert [file.name for file in path.parent.iterdir()] == ["log.jsonl"]

  @pytest.mark.parametrize(
    "step, kept", [(None, []), (0, [0]), (2, [0, 1, 2]), (9, [0, 1, 2, 3])]
  )
  def test_later_parts_of_a_store_go(self, store, step, kept):
    for number in range(4):
      jsonl.append("gs://bucket/log.jsonl", [{"step": number}])
    jsonl.drop_after("gs://bucket/log.jsonl", step)
    assert [obj["step"] for obj in jsonl.read("gs://bucket/log.jsonl")] == kept
    assert len(store.objects) == len(kept) and set(store.writes.values()) == {1}

  def test_line_that_was_cut_off_goes_too(self, path):
    path.write_text('{"step": 1}\n{"st')
    jsonl.drop_after(path, 5)
    assert path.read_text() == '{"step": 1}\n'

  def test_no_file_stays_no_file(self, path):
    jsonl.drop_after(path, 3)
    assert not path.exists()


def test_long_log_is_read(path):
  # Longer than what is read of others, without taking room on the disk.
  with path.open("wb") as file:
    file.truncate(bounded.DEFAULT_LIMITS.max_bytes)
    file.seek(0, os.SEEK_END)
    file.write(b'\n{"step": 1}\n')
  assert jsonl.read(path) == [{"step": 1}]

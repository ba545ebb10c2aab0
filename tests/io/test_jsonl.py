"""Tests of io/jsonl.py."""

from etils import epath
import pytest

from r3jax.io import jsonl


@pytest.fixture
def path(tmp_path):
  return tmp_path / "log.jsonl"


class TestAppend:

  def test_lines_follow_each_other(self, path):
    jsonl.append(path, [{"step": 1}])
    jsonl.append(path, [{"step": 2, "text": "a\nb"}, {"step": 3}])
    assert path.read_text() == '{"step": 1}\n{"step": 2, "text": "a\\nb"}\n{"step": 3}\n'

  def test_nan_is_refused(self, path):
    with pytest.raises(ValueError):
      jsonl.append(path, [{"step": 1, "x": float("nan")}])
    assert not path.exists()

  def test_object_store_is_written_anew(self, path, monkeypatch):
    class Store(type(epath.Path(path))):
      """A local file that says it is remote and cannot be appended to."""

      def __str__(self):
        return "gs:/" + super().__str__()

      def __fspath__(self):
        return super().__str__()

      def open(self, mode="r", **kwargs):
        assert "a" not in mode
        return open(super().__str__(), mode, **kwargs)

    monkeypatch.setattr(jsonl.epath, "Path", Store)
    jsonl.append(path, [{"step": 1}])
    jsonl.append(path, [{"step": 2}])
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


class TestRead:

  def test_no_file_has_no_objects(self, path):
    assert jsonl.read(path) == []

  def test_line_that_was_cut_off_is_left_out(self, path):
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert jsonl.read(path) == [{"step": 1}, {"step": 2}]

  def test_other_bad_line_is_an_error(self, path):
    path.write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(ValueError):
      jsonl.read(path)


class TestDropAfter:

  @pytest.mark.parametrize("step, kept", [(None, []), (0, [0]), (2, [0, 1, 2]), (9, [0, 1, 2, 3])])
  def test_later_steps_go(self, path, step, kept):
    jsonl.append(path, [{"step": step} for step in range(4)])
    jsonl.drop_after(path, step)
    assert [obj["step"] for obj in jsonl.read(path)] == kept
    assert [file.name for file in path.parent.iterdir()] == ["log.jsonl"]

  def test_line_that_was_cut_off_goes_too(self, path):
    path.write_text('{"step": 1}\n{"st')
    jsonl.drop_after(path, 5)
    assert path.read_text() == '{"step": 1}\n'

  def test_no_file_stays_no_file(self, path):
    jsonl.drop_after(path, 3)
    assert not path.exists()

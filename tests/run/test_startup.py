"""Tests of cli/startup.py."""

import logging as python_logging
import re
import sys

from absl import logging
import jax
import ml_collections
import pytest

from r3jax.cli import startup


@pytest.fixture(name="cache", autouse=True)
def fixture_cache(monkeypatch, tmp_path):
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
  before = {
    name: getattr(jax.config, name)
    for name in (
      "jax_compilation_cache_dir",
      "jax_persistent_cache_min_compile_time_secs",
    )
  }
  jax.config.update("jax_compilation_cache_dir", str(tmp_path))
  yield tmp_path
  for name, value in before.items():
    jax.config.update(name, value)


class TestKeepPrograms:
  def test_traced_ones_lie_beside_the_compiled(self, cache):
    mesh = ml_collections.ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    assert startup.keep_programs(mesh) == cache / "traced"

  @pytest.mark.parametrize("fsdp, tensor", [(2, 1), (1, 2)])
  def test_nothing_is_kept_where_cpus_shard_parameters(self, fsdp, tensor):
    mesh = ml_collections.ConfigDict(
      {"data": -1, "fsdp": fsdp, "tensor": tensor}
    )
    assert (
      startup.keep_programs(mesh) is None
      and not jax.config.jax_compilation_cache_dir
    )

  def test_nothing_is_kept_where_the_folder_cannot_be_written(
    self, monkeypatch
  ):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/proc/r3jax")
    mesh = ml_collections.ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    assert startup.keep_programs(mesh) is None
    assert jax.config.jax_compilation_cache_dir is None


class TestLogOurs:
  @pytest.fixture(name="handler")
  def fixture_handler(self):
    """The handler of absl, which is as it was afterwards."""
    handler = logging.get_absl_handler()
    verbosity = logging.get_verbosity()
    filters = list(handler.filters)
    yield handler
    handler.filters[:] = filters
    handler.setFormatter(logging.PythonFormatter())
    logging.set_verbosity(verbosity)

  @staticmethod
  def _format(handler, level: int, message: str) -> str:
    path = startup.__file__
    record = python_logging.LogRecord(
      "absl", level, path, 7, message, None, None
    )
    return handler.format(record)

  @pytest.mark.parametrize("is_terminal", [True, False])
  def test_lines_are_short_on_a_terminal_and_complete_elsewhere(
    self, handler, monkeypatch, is_terminal
  ):
    monkeypatch.setattr(
      sys.stderr, "isatty", lambda: is_terminal, raising=False
    )
    startup.log_ours()
    line = self._format(handler, python_logging.INFO, "iteration 1/40")
    warning = self._format(handler, python_logging.WARNING, "it \x1b[31mis")
    if is_terminal:
      assert (line, warning) == ("iteration 1/40", "warning: it  [31mis")
    else:
      assert re.fullmatch(
        r"I\d{4} [\d:.]+ +\d+ startup.py:7\] iteration 1/40", line
      )
      assert warning.startswith("W")


class TestTogether:
  def test_message_of_what_cannot_be_is_all_that_is_said(self):
    def fails(what):
      raise ValueError(f"it must be another; got {what}")

    with pytest.raises(SystemExit, match="^r3jax: it must be another; got 3$"):
      startup.together(fails, 3)
    assert startup.together(lambda x: x + 1, 3) == 4


class TestShowOurs:
  def test_only_what_a_failed_save_leaves_behind_is_not_shown(self):
    shown = []

    def show(kind, error, trace):
      shown.append((kind, str(error), trace))

    for error in (
      RuntimeError("Event loop is closed"),
      RuntimeError("another"),
      ValueError("Event loop is closed"),
    ):
      startup._show_ours(show, type(error), error, None)
    assert shown == [
      (RuntimeError, "another", None),
      (ValueError, "Event loop is closed", None),
    ]

"""Tests of run/evaluation_setup.py."""

import pytest

from r3jax.files import config_files
from r3jax.files import config_guard
from r3jax.run import evaluation_setup
from r3jax.run import sessions


class TestJudgeFiles:
  """A judge's files are what is in them, wherever they lie and however the path is spelled."""

  @staticmethod
  def _identity(path, key: str = "judge.prompt_file") -> dict:
    config = config_files.load("r3_geneval:shapes")
    config.reward.name = "judge"
    if key.startswith("members"):
      config.reward.name = "sum"
      files = {"prompt_file": str(path)}
      with config.unlocked():
        config.reward.members.net = {
          "name": "judge",
          "weight": 1.0,
          "judge": files,
        }
    else:
      config.reward.update_from_flattened_dict({key: str(path)})
    return evaluation_setup._identity(config, ())

  @pytest.fixture(name="files")
  def fixture_files(self, tmp_path):
    for name, text in (("a", "$prompt?"), ("b", "$prompt?"), ("c", "$prompt")):
      (tmp_path / name).write_text(text)
    return tmp_path

  @pytest.mark.parametrize(
    "key",
    [
      "judge.prompt_file",
      "judge.eval_system_file",
      "members.net.judge.prompt_file",
    ],
  )
  def test_evaluations_differ_by_content(self, files, key):
    first = self._identity(files / "a", key)
    assert self._identity(files / "b", key) == first
    assert self._identity(files / "c", key) != first

  def test_no_file_is_read_where_no_judge_is_asked(self):
    config = config_files.load("r3_geneval:shapes")
    config.reward.judge.prompt_file = "nowhere"
    identity = evaluation_setup._identity(config, ())
    assert identity["reward"]["judge"]["prompt_file"] == "nowhere"

  @pytest.mark.parametrize(
    "section",
    ["reward.judge", "reward.members.net.judge", "reward_services.judge"],
  )
  def test_run_resumes_with_a_file_that_was_moved(self, section):
    key = f"{section}.prompt_file"
    assert config_guard.agree({key: "a"}, {key: "b"}, sessions.MAY_DIFFER)

  def test_run_does_not_resume_with_another_wording(self):
    key = "reward_services.judge.wording_sha256"
    assert not config_guard.agree({key: "a"}, {key: "b"}, sessions.MAY_DIFFER)

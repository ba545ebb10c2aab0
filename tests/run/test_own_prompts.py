"""Tests of runs and evaluations of a user's own texts, which say nothing but themselves."""

import json
import pathlib
import sys

import pytest

from r3jax.run import evaluation_job
from r3jax.run import sessions
from r3jax.run import setup
from tests import tiny

REWARD = "def red(image, prompt):\n  return image[..., 0].mean() / 255\n"


@pytest.fixture
def config(tiny_model, tmp_path, monkeypatch):
  """A config of two files of the user's, and of a reward that reads no field of a prompt."""
  (tmp_path / "own_reward.py").write_text(REWARD)
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.setenv("R3JAX_DATA", str(tmp_path / "data"))
  (tmp_path / "train.txt").write_text("a red ring\n\na bow\na blue heart\n")
  heldout = [{"prompt": "a ring", "tag": "rings"}, {"prompt": "a spool"}]
  lines = "".join(json.dumps(record) + "\n" for record in heldout)
  (tmp_path / "heldout.jsonl").write_text(lines)
  changes = {
    "data.train": str(tmp_path / "train.txt"),
    "data.heldout": str(tmp_path / "heldout.jsonl"),
    "reward.name": "own_reward:red",
    "reward.value": "score",
    "mesh.data": 8,
    "eval.batch_size": 8,
    "eval.prompts": 0,
  }
  yield tiny.make_config(pathlib.Path(tiny_model), changes)
  sys.modules.pop("own_reward", None)


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch):
  monkeypatch.setattr(setup.Experiment, "start", lambda *_: ({}, None))


class TestTrain:
  def test_run_needs_nothing_but_texts(self, config, tmp_path):
    session, _ = sessions.prepare(config, str(tmp_path / "run"))
    assert len(session.experiment.train) == 3
    tags = [prompt.tag for prompt in session.experiment.heldout]
    assert sorted(tags) == ["rings", "untagged"]
    lines = (tmp_path / "run" / "training_prompts.jsonl").read_text()
    assert json.loads(lines.splitlines()[0]) == {
      "tag": "untagged",
      "prompt": "a red ring",
    }

  def test_reward_that_needs_a_field_names_it_and_the_lines(
    self, config, tmp_path
  ):
    config.reward.name = "world"
    with pytest.raises(ValueError) as error:
      sessions.prepare(config, str(tmp_path / "run"))
    head, *lines = str(error.value).splitlines()
    assert head == "2 problems with prompts:"
    for number, line in enumerate(lines, start=1):
      assert line.startswith(f"{tmp_path / 'heldout.jsonl'}:{number}: ")
      assert "the field include is missing" in line
    assert not (tmp_path / "run").exists()


class TestEvaluate:
  def test_evaluation_needs_no_training_prompts(self, config, tmp_path):
    config.data.train = "/nowhere.txt"
    job = evaluation_job.prepare(config, str(tmp_path / "evaluation"))
    assert len(job.evaluation.records) == 2

  def test_missing_field_is_named_there_too(self, config, tmp_path):
    config.data.train = "/nowhere.txt"
    config.reward.name = "world"
    with pytest.raises(ValueError, match="heldout.jsonl:1: .*field include"):
      evaluation_job.prepare(config, str(tmp_path / "evaluation"))

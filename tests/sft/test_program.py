"""Test of the whole supervised training, as its command runs it, at the smallest size."""

import ml_collections
import pytest

from configs import sft_shapes
from r3jax.checkpoint import pretrained
from r3jax.files import config_guard
from r3jax.sft import config_rules
from r3jax.sft import curves
from r3jax.sft import program
from r3jax.sft import stages
from r3jax.worlds.shapes import prompts
from tests import tiny

CHANGES = {
  "log_every": 1,
  "save_every": 2,
  "joint.copies": 1,
  "exam.every": 2,
  "exam.prompts": 1,
  "exam.images": 12,
  "exam.points": 3,
  "exam.batch_size": 24,
}


class Killed(Exception):
  """Ends a run as a killed process would."""


def _config() -> ml_collections.ConfigDict:
  config = sft_shapes.get_config()
  with config.unlocked():
    config.model.update(tiny.SIZES)
    for stage in config_rules.STAGES:
      config[stage].update(num_steps=4, batch_size=8, warmup=1)
    config.update_from_flattened_dict(CHANGES)
  return config


def _weights(folder) -> bytes:
  return (folder / "ema.safetensors").read_bytes()


@pytest.mark.slow
def test_interrupted_run_ends_as_an_uninterrupted_one(tmp_path, monkeypatch):
  whole = tmp_path / "whole"
  killed = tmp_path / "killed"
  program.run(_config(), whole, None)

  images = curves.Exam.images

  def die(exam, policy, towers):
    # The first measurement of the last stage: three stages are done by then.
    raise Killed

  monkeypatch.setattr(curves.Exam, "images", die)
  with pytest.raises(Killed):
    program.run(_config(), killed, None)
  before = _weights(killed)
  monkeypatch.setattr(curves.Exam, "images", images)
  program.run(_config(), killed, None)
  assert before != _weights(killed) == _weights(whole)

  assert pretrained.find(str(killed)).tokenizer.size
  records = [
    stages.record(folder / "training", "joint") for folder in (whole, killed)
  ]
  assert records[0].scores == records[1].scores
  scores = records[0].scores[-1]
  for tag in prompts.TAGS:
    for group in ("draft", "edit", "untouched", "judgement"):
      assert 0 <= scores[f"{group}/{tag}"] <= 1
  assert "| joint | 4 |" in (killed / "README.md").read_text()


def test_another_config_is_refused(tmp_path):
  config = _config()
  folder = tmp_path / "training"
  folder.mkdir()
  changed = config.to_dict()
  changed["mix"]["questions"] = 0.5
  config_guard.write_or_check(folder, changed, ())
  with pytest.raises(ValueError, match="mix.questions"):
    program.run(config, tmp_path, None)

"""Tests of what docs/howto/own_prompts.md and docs/howto/add_a_benchmark.md show."""

import sys

import numpy as np
import pytest

from configs import r3_geneval
from r3jax.data import records
from r3jax.data import sets
from r3jax.rewards.from_host import user_function
from tests import pages


def settings(**changes) -> sets.Settings:
  """Returns the config's `data` with changes."""
  return sets.Settings(**r3_geneval.get_config().data.to_dict() | changes)


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """Returns the working directory of a user, from which modules can be imported."""
  monkeypatch.setenv("R3JAX_DATA", str(tmp_path / "data"))
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(tmp_path)
  return tmp_path


def test_own_texts_are_read_and_the_one_in_the_test_set_is_dropped(folder):
  train, _ = pages.code_blocks("howto/own_prompts.md", "text")
  heldout, *_ = pages.code_blocks("howto/own_prompts.md", "json")
  (folder / "train.txt").write_text(train)
  (folder / "heldout.jsonl").write_text(heldout)
  prompts = sets.load(settings(train="train.txt", heldout="heldout.jsonl"))
  assert len(prompts.train) == 3
  tags = [prompt.tag for prompt in prompts.heldout]
  assert tags == ["places", "styles", "untagged"]
  assert prompts.contamination.tags["untagged"].folded == 1


def test_the_reward_for_own_texts_scores_them(folder):
  (module,) = pages.code_blocks("howto/own_prompts.md", "python")
  (folder / "my_reward.py").write_text(module)
  reward = user_function.UserFunction("my_reward:warmth", (4, 4))
  prompt = records.Prompt("untagged", "a cat")
  reward.check(prompt)
  red = np.zeros((1, 4, 4, 3), np.uint8)
  red[..., 0] = 255
  (scored,) = reward.score(red, [prompt])
  assert scored.score == 1
  sys.modules.pop("my_reward", None)


def test_verified_prompts_are_read_and_the_one_in_the_test_set_is_dropped(
  folder,
):
  _, train, heldout = pages.code_blocks("howto/own_prompts.md", "json")
  (folder / "train.jsonl").write_text(train)
  (folder / "heldout.jsonl").write_text(heldout)
  prompts = sets.load(settings(train="train.jsonl", heldout="heldout.jsonl"))
  assert [prompt.text for prompt in prompts.train] == [
    "a photo of a blue cat",
    "a photo of two cups",
    "a photo of a dog above a bear",
  ]
  assert len(prompts.heldout) == 3
  assert prompts.contamination.tags["colors"].folded == 1


class TestAddABenchmark:
  @pytest.fixture
  def config(self, folder):
    """Returns the page's config, with its benchmark and its test set written to files."""
    module, config_module = pages.code_blocks(
      "howto/add_a_benchmark.md", "python"
    )
    (test_set,) = pages.code_blocks("howto/add_a_benchmark.md", "json")
    (folder / "street.py").write_text(module)
    (folder / "street_test.jsonl").write_text(test_set)
    namespace = {}
    exec(config_module, namespace)  # pylint: disable=exec-used
    yield namespace["get_config"]()
    sys.modules.pop("street", None)

  def test_generated_prompts_avoid_the_test_set(self, config):
    prompts = sets.load(
      sets.Settings(**config.data.to_dict() | {"generated": 24})
    )
    overlap = prompts.contamination.tags["one_vehicle"]
    assert (overlap.total, overlap.text, overlap.include) == (16, 1, 1)
    assert len(prompts.train) == 22 and len(prompts.heldout) == 3
    assert {prompt.tag for prompt in prompts.train} == {
      "one_vehicle",
      "vehicles",
    }

  def test_the_config_of_the_page_is_complete(self, config):
    assert config.is_locked
    prompts = sets.load(sets.Settings(**config.data))
    assert 18 <= len(prompts.train) <= 20

  def test_other_tag_is_refused(self, config, folder):
    text = (folder / "street_test.jsonl").read_text()
    (folder / "street_test.jsonl").write_text(text.replace("vehicles", "many"))
    with pytest.raises(ValueError, match="tag must be one of .'one_vehicle'"):
      sets.load(sets.Settings(**config.data))

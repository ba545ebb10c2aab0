"""Tests of how often every prompt and every tag is drawn."""

import collections
import json
import logging

import pytest

from configs import r3_geneval
from r3jax.data import records
from r3jax.run import prompt_selection
from r3jax.run import setup
from tests import tiny

# Prompts of each tag; counting has the share that it has in R3's file, 0.013.
NUMBER_BY_TAG = {
  "counting": 13,
  "colors": 127,
  "position": 150,
  "two_object": 310,
  "color_attr": 400,
}


def _prompts() -> list[records.Prompt]:
  prompts = []
  for tag, number in NUMBER_BY_TAG.items():
    item = records.Expectation("bench", 1)
    prompts += [
      records.Prompt(tag, f"{tag} number {i}", (item,)) for i in range(number)
    ]
  return prompts


def _shares(prompts) -> dict[str, float]:
  counts = collections.Counter(prompt.tag for prompt in prompts)
  return {tag: counts[tag] / len(prompts) for tag in counts}


class TestBalanced:
  def test_draws_every_tag_equally_often(self):
    prompts = prompt_selection.balanced(_prompts())
    assert set(_shares(prompts).values()) == {0.2}
    times = collections.Counter(prompt.text for prompt in prompts)
    counting = [times[f"counting number {i}"] for i in range(13)]
    # 400 draws of 13 prompts
    assert sorted(set(counting)) == [30, 31]


class TestDescribe:
  def test_shows_prompts_shares_and_repetitions(self):
    before = prompt_selection.describe(_prompts()).splitlines()
    after = prompt_selection.describe(
      prompt_selection.balanced(_prompts())
    ).splitlines()
    assert before[0].strip() == "tag         prompts   share  times an epoch"
    assert before[3].split() == ["counting", "13", "0.013", "1"]
    assert after[3].split() == ["counting", "13", "0.200", "30.8"]
    assert len(before) == len(after) == 6


class TestBuild:
  @pytest.fixture
  def config(self, tiny_model, tmp_path):
    """Returns a config whose file has one tag three times as often as the others."""
    config = tiny.make_config(tiny_model)
    lines = (tiny_model / "train.jsonl").read_text().splitlines()
    tag = json.loads(lines[0])["tag"]
    same_tag = [line for line in lines if json.loads(line)["tag"] == tag]
    others = [line for line in lines if json.loads(line)["tag"] != tag]
    # One prompt of every other tag.
    by_tag = {json.loads(line)["tag"]: line for line in others}
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join([*same_tag, *by_tag.values()]) + "\n")
    config.data.train = str(path)
    return config

  def test_a_file_is_drawn_as_it_is(self, config, caplog):
    config.data.balance = "none"
    with caplog.at_level(logging.INFO):
      train = setup.build(config).train
    assert len({prompt.text for prompt in train}) == len(train)
    assert "data.balance is 'none'" in caplog.text
    assert "times an epoch" in caplog.text

  def test_tags_are_balanced_where_the_config_says_so(self, config):
    config.data.balance = "tag"
    assert len(set(_shares(setup.build(config).train).values())) == 1

  def test_another_value_is_refused(self, config):
    config.data.balance = "prompt"
    with pytest.raises(ValueError, match="data.balance must be one of"):
      setup.build(config)


class TestDefaults:
  def test_files_are_not_balanced_and_the_embedded_world_is(self):
    assert r3_geneval.get_config().data.balance == "none"
    assert r3_geneval.get_config("shapes").data.balance == "tag"
    assert r3_geneval.get_config("smoke").data.balance == "tag"

  def test_the_embedded_world_draws_what_it_always_drew(self):
    train = setup.build(r3_geneval.get_config("shapes")).train
    # Recorded before `data.balance` existed.
    assert records.sha256(train) == (
      "21aec400646d22dffaffb7874db57047d354b32ed66bf9a88e86fb9485b67f1f"
    )

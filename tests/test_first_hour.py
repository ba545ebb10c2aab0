"""Tests of docs/howto/first_hour.md; `python -m tests.first_hour` runs it and takes the time."""

import numpy as np

from r3jax.data import records
from r3jax.worlds import registry
from tests import first_hour

STEPS = first_hour.steps((first_hour.ROOT / first_hour.PAGE).read_text())


def test_every_step_makes_what_it_promises():
  assert sorted(STEPS) == [0, *first_hour.PROMISES]
  for number, promise in first_hour.PROMISES.items():
    folder = promise.pattern.rpartition("/")[0]
    assert f"={folder}" in STEPS[number].commands


def test_the_reward_scores_red():
  namespace = {}
  exec(STEPS[2].files["my_rewards.py"], namespace)  # pylint: disable=exec-used
  image = np.zeros((10, 10, 3), np.uint8)
  prompt = records.Prompt("untagged", "a photo of a ring")
  assert namespace["redness"](image, prompt) == 0
  image[:1, :5, 0] = 255
  assert namespace["redness"](image, prompt) == 0.5
  image[..., 0] = 255
  assert namespace["redness"](image, prompt) == 1


def test_the_small_model_knows_the_words_of_the_prompts():
  world = registry.find("shapes")
  texts = {record.text for record in world.records("train")}
  words = {word for text in texts for word in text.split()}
  train, heldout = (
    STEPS[3].files[f"{name}.txt"] for name in ("train", "heldout")
  )
  assert set(train.split()) | set(heldout.split()) <= words
  assert not set(train.splitlines()) & set(heldout.splitlines())

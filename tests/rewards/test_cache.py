"""Tests of rewards/from_host/cache.py."""

import dataclasses

import numpy as np

from r3jax.data import records
from r3jax.rewards import outcome
from r3jax.rewards.from_host import cache
from tests import documented

IMAGES = np.arange(4, dtype=np.uint8)[:, None, None, None] * np.ones(
  (1, 2, 2, 3), np.uint8
)
PROMPT = records.Prompt("t", "p")


class Counting:
  """Scores the first pixel and notes what it is asked; fails for 3."""

  parts = ("strict",)

  def __init__(self):
    self.asked = []

  def check(self, prompt):
    pass

  def score(self, images, prompts):
    self.asked += [int(image[0, 0, 0]) for image in images]
    return [
      outcome.Failed("3")
      if image[0, 0, 0] == 3
      else outcome.Ok(image[0, 0, 0] / 4, {"strict": 0.0})
      for image in images
    ]

  def describe(self):
    return {"model": "m"}

  def metrics(self):
    return {}


class TestCached:
  def test_known_images_are_not_asked_again_and_failures_are(self):
    inner = Counting()
    reward = cache.Cached(inner, 100)
    first = reward.score(IMAGES, [PROMPT] * 4)
    assert [getattr(one, "score", None) for one in first] == [
      0,
      0.25,
      0.5,
      None,
    ]
    assert reward.score(IMAGES, [PROMPT] * 4) == first
    assert inner.asked == [0, 1, 2, 3, 3]
    assert reward.metrics() == {"cache_hits": 3}
    documented.check(["service/judge/cache_hits"], "cache")
    assert reward.metrics() == {"cache_hits": 0}

  def test_equal_images_of_a_batch_are_asked_once(self):
    inner = Counting()
    found = cache.Cached(inner, 100).score(IMAGES[[1, 1, 2, 1]], [PROMPT] * 4)
    assert [one.score for one in found] == [0.25, 0.25, 0.5, 0.25]
    assert inner.asked == [1, 2]

  def test_another_prompt_or_shape_is_another_question(self):
    inner = Counting()
    reward = cache.Cached(inner, 100)
    reward.score(IMAGES[1:2], [PROMPT])
    reward.score(IMAGES[1:2], [dataclasses.replace(PROMPT, text="q")])
    reward.score(IMAGES[1:2].reshape(1, 4, 1, 3), [PROMPT])
    assert inner.asked == [1, 1, 1]

  def test_least_recently_used_is_forgotten(self):
    inner = Counting()
    reward = cache.Cached(inner, 2)
    for i in (0, 1, 0, 2, 0, 1):
      reward.score(IMAGES[i : i + 1], [PROMPT])
    assert inner.asked == [0, 1, 2, 1]

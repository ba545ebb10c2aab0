"""Remembers the scores of images, so that no image is scored twice."""

import collections
from collections.abc import Sequence
import hashlib
import json
import threading

import numpy as np

from r3jax.data import records
from r3jax.rewards import outcome


class Cached:
  """A host reward that calls another one only for images that it has not scored yet.

  The key is the image, the prompt and the identity of the reward (model, wording). Only scores are
  stored: images that failed or were invalid are scored again.
  """

  def __init__(self, reward: outcome.HostReward, capacity: int):
    """Stores up to `capacity` scores, the most recently used.

    Raises:
      ValueError: the capacity is below 1.
    """
    if capacity < 1:
      raise ValueError(
        f"reward.cache must be at least 1, or 0 for none; got {capacity}"
      )
    self.parts = reward.parts
    self._reward = reward
    self._capacity = capacity
    self._identity = json.dumps(reward.describe(), sort_keys=True).encode()
    # The least recently used comes first.
    self._scores: collections.OrderedDict[bytes, outcome.Ok] = (
      collections.OrderedDict()
    )
    self._lock = threading.Lock()
    self._hits = 0

  def check(self, prompt: records.Prompt) -> None:
    """Checks a prompt, see `outcome.HostReward`."""
    self._reward.check(prompt)

  def score(
    self, images: np.ndarray, prompts: Sequence[records.Prompt]
  ) -> list[outcome.Outcome]:
    """Scores images, see `outcome.HostReward`."""
    keys = [
      self._key(image, prompt)
      for image, prompt in zip(images, prompts, strict=True)
    ]
    # Of images that are equal only the first is scored.
    first_row: dict[bytes, int] = {}
    for row, key in enumerate(keys):
      first_row.setdefault(key, row)
    with self._lock:
      results: dict[bytes, outcome.Outcome] = {
        key: self._scores[key] for key in first_row if key in self._scores
      }
    rows = [row for key, row in first_row.items() if key not in results]
    if rows:
      new_results = self._reward.score(
        images[rows], [prompts[row] for row in rows]
      )
      for row, result in zip(rows, new_results, strict=True):
        results[keys[row]] = result
    self._store(results, hits=len(keys) - len(rows))
    return [results[key] for key in keys]

  def _store(self, results: dict[bytes, outcome.Outcome], hits: int) -> None:
    """Stores the scores among results, and counts the images that were not scored again."""
    with self._lock:
      self._hits += hits
      for key, result in results.items():
        if isinstance(result, outcome.Ok):
          self._scores[key] = result
          self._scores.move_to_end(key)
      while len(self._scores) > self._capacity:
        self._scores.popitem(last=False)

  def _key(self, image: np.ndarray, prompt: records.Prompt) -> bytes:
    """Returns a digest of everything that a score depends on."""
    content = (
      self._identity,
      json.dumps(image.shape).encode(),
      np.ascontiguousarray(image).tobytes(),
      json.dumps(prompt.to_json(), sort_keys=True).encode(),
    )
    digest = hashlib.sha256()
    for part in content:
      # Hashes of the parts have one length, so that no part can run into the next.
      digest.update(hashlib.sha256(part).digest())
    return digest.digest()

  def describe(self) -> dict:
    """Returns what scores, see `outcome.HostReward`."""
    return self._reward.describe()

  def metrics(self) -> dict[str, float]:
    """Returns the reward's metrics, and as cache_hits the number of images not scored again."""
    with self._lock:
      hits = self._hits
      self._hits = 0
    return self._reward.metrics() | {"cache_hits": float(hits)}

"""Remembers what images scored, so that the same question is not asked twice."""

import collections
from collections.abc import Sequence
import hashlib
import json
import threading

import numpy as np

from r3jax.rewards import outcome as outcome_lib


class Cached:
  """A host reward that asks another one only for what it has not scored yet.

  Keyed by image, record and what the reward says it is (model, wording). Only scores are kept: what
  failed is asked again.
  """

  def __init__(self, reward: outcome_lib.HostReward, capacity: int):
    """Keeps up to `capacity` scores, the most recently used.

    Raises:
      ValueError: the capacity is below 1.
    """
    if capacity < 1:
      raise ValueError(
        f"reward.cache must be at least 1, or 0 for none; got {capacity}"
      )
    self._reward, self._capacity = reward, capacity
    self._identity = json.dumps(reward.describe(), sort_keys=True).encode()
    self._kept: collections.OrderedDict[bytes, outcome_lib.Ok] = (
      collections.OrderedDict()
    )
    self._lock = threading.Lock()
    self._hits = 0
    self.parts = reward.parts

  def check(self, record: dict):
    """See `base.HostReward`."""
    self._reward.check(record)

  def score(
    self, images: np.ndarray, records: Sequence[dict]
  ) -> list[outcome_lib.Outcome]:
    """See `base.HostReward`."""
    keys = [self._key(image, record) for image, record in zip(images, records)]
    # one image of those that are equal
    first = {key: row for row, key in reversed(list(enumerate(keys)))}
    with self._lock:
      known = {key: self._kept[key] for key in first if key in self._kept}
    rows = sorted(row for key, row in first.items() if key not in known)
    asked = (
      self._reward.score(images[rows], [records[row] for row in rows])
      if rows
      else []
    )
    found = known | {keys[row]: outcome for row, outcome in zip(rows, asked)}
    self._keep(found, len(keys) - len(rows))
    return [found[key] for key in keys]

  def _keep(self, found: dict[bytes, outcome_lib.Outcome], hits: int):
    with self._lock:
      self._hits += hits
      for key, outcome in found.items():
        if isinstance(outcome, outcome_lib.Ok):
          self._kept[key] = outcome
          self._kept.move_to_end(key)
      while len(self._kept) > self._capacity:
        self._kept.popitem(last=False)

  def _key(self, image: np.ndarray, record: dict) -> bytes:
    shape, asked = (
      json.dumps(image.shape).encode(),
      json.dumps(record, sort_keys=True).encode(),
    )
    digest = hashlib.sha256()
    for part in (
      self._identity,
      shape,
      np.ascontiguousarray(image).tobytes(),
      asked,
    ):
      digest.update(hashlib.sha256(part).digest())
    return digest.digest()

  def describe(self) -> dict:
    """See `base.HostReward`."""
    return self._reward.describe()

  def metrics(self) -> dict[str, float]:
    """See `base.HostReward`; adds cache_hits, images that were not asked for."""
    with self._lock:
      hits, self._hits = self._hits, 0
    return self._reward.metrics() | {"cache_hits": float(hits)}

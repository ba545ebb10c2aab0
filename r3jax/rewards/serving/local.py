"""Rewards that a server computes on its own machine."""

from collections.abc import Sequence
import dataclasses

import jax
import numpy as np

from r3jax.data import validation
from r3jax.rewards import outcome as outcome_lib
from r3jax.rewards.serving import detector as detector_lib
from r3jax.rewards.serving import geneval
from r3jax.worlds import base as worlds_base
from r3jax.worlds import registry


class Verifier:
  """A world's exact verifier, outside the step.

  Not for use inside the step's own process: it computes on JAX's devices, which wait for the step.
  """

  def __init__(self, world: worlds_base.World):
    """Compiles, so that the first request need not wait for it."""
    self.parts = world.parts
    self._world = world
    self._compiled = jax.jit(world.verify)
    self._verify(
      [np.zeros((*world.canvas, 3), np.uint8)], world.records("heldout")[:1]
    )

  def check(self, record: dict):
    """See `base.HostReward`."""
    self._world.encode([record])

  def score(
    self, images: np.ndarray, records: Sequence[dict]
  ) -> list[outcome_lib.Outcome]:
    """See `base.HostReward`; images of another size and unknown records are invalid."""
    problems = [
      self._problem(image, record)
      for image, record in zip(images, records, strict=True)
    ]
    outcomes = [
      outcome_lib.Invalid(problem) if problem else None for problem in problems
    ]
    rows = [row for row, problem in enumerate(problems) if not problem]
    for row, outcome in zip(
      rows,
      self._verify(
        [images[row] for row in rows], [records[row] for row in rows]
      ),
    ):
      outcomes[row] = outcome
    return outcomes

  def _problem(self, image: np.ndarray, record: dict) -> str:
    height, width = self._world.canvas
    if image.shape != (height, width, 3):
      return f"an image must be {height} x {width} pixels; got {image.shape}"
    if problems := validation.find_problems(record):
      return f"the record cannot be judged: {problems[0]}"
    try:
      self.check(record)
    except ValueError as error:
      return f"the record cannot be judged: {error}"
    return ""

  def _verify(
    self, images: list[np.ndarray], records: list[dict]
  ) -> list[outcome_lib.Outcome]:
    return [
      outcome
      for start in range(0, len(images), _BATCH)
      for outcome in self._verify_batch(
        images[start : start + _BATCH], records[start : start + _BATCH]
      )
    ]

  def _verify_batch(
    self, images: list[np.ndarray], records: list[dict]
  ) -> list[outcome_lib.Outcome]:
    padding = _BATCH - len(images)  # one size to compile for
    target = self._world.encode(records + records[:1] * padding)
    found = jax.device_get(
      self._compiled(np.stack(images + images[:1] * padding), target)
    )
    return [
      outcome_lib.Ok(
        float(found.value[i]),
        {name: float(found.parts[name][i]) for name in self.parts},
      )
      for i in range(len(images))
    ]

  def describe(self) -> dict:
    """See `base.HostReward`."""
    return {
      "model": f"{self._world.name} verifier",
      **self._world.verifier_facts,
    }

  def metrics(self) -> dict[str, float]:
    """See `base.HostReward`."""
    return {}


_BATCH = 16


class GenEval:
  """GenEval's rules on what a detector finds, see `geneval.py` and `detector.py`."""

  parts = ("correct", "strict")

  def __init__(
    self,
    detector: detector_lib.Detector,
    thresholds: geneval.Thresholds = geneval.Thresholds(),
  ):
    self._detector, self._thresholds = detector, thresholds

  def check(self, record: dict):
    """See `base.HostReward`."""
    geneval.check_record(record)

  def score(
    self, images: np.ndarray, records: Sequence[dict]
  ) -> list[outcome_lib.Outcome]:
    """See `base.HostReward`; records that the rules do not know are invalid."""
    return [
      self._score_one(image, record)
      for image, record in zip(images, records, strict=True)
    ]

  def _score_one(self, image: np.ndarray, record: dict) -> outcome_lib.Outcome:
    try:
      self.check(record)
    except ValueError as error:
      return outcome_lib.Invalid(f"the record cannot be judged: {error}")
    detections = self._detector.detect(image, record)
    found = geneval.judge(record, detections, self._thresholds)
    detail = {
      "reasons": list(found.reasons),
      "detections": [dataclasses.asdict(one) for one in detections],
    }
    return outcome_lib.Ok(
      found.score,
      {"correct": float(found.correct), "strict": float(found.strict)},
      detail,
    )

  def describe(self) -> dict:
    """See `base.HostReward`."""
    return {
      "model": self._detector.name,
      "thresholds": dataclasses.asdict(self._thresholds),
    }

  def metrics(self) -> dict[str, float]:
    """See `base.HostReward`."""
    return {}


# what a server can score by: GenEval's rules, or the verifier of a world
NAMES = ("geneval", *registry.REGISTERED)


def load(
  name: str, detector: str, clip: str, thresholds: geneval.Thresholds
) -> GenEval | Verifier:
  """Returns a reward for a server.

  Args:
    name: one of NAMES.
    detector, clip: folders or names of the models that GenEval's rules need.
    thresholds: of GenEval's rules.

  Raises:
    ValueError: the models cannot be loaded.
  """
  if name == "geneval":
    return GenEval(detector_lib.load(detector, clip), thresholds)
  return Verifier(registry.find(name))

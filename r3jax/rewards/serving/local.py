"""Rewards that a server computes on its own machine."""

from collections.abc import Sequence
from concurrent import futures
import dataclasses
import os

import jax
import numpy as np

from r3jax.data import records
from r3jax.rewards import outcome
from r3jax.rewards.serving import detector as detectors
from r3jax.rewards.serving import geneval
from r3jax.rewards.serving import ocr
from r3jax.rewards.serving import preferences
from r3jax.rewards.serving import text_reader
from r3jax.worlds import base
from r3jax.worlds import registry

# A server scores by GenEval's rules, by the text that it reads, by a model of preferences, or by
# the verifier of a world.
NAMES = ("geneval", "ocr", *preferences.KINDS, *registry.REGISTERED)
# Images of a batch. The verifier is compiled for this size only.
_BATCH = 16
_NO_OPTIONS = preferences.Options()
# Images whose text is read at the same time; each thread holds the reader's weights.
MOST_READERS = 16


class Verifier:
  """A world's exact verifier, outside the step.

  Not for use inside the step's own process: it computes on JAX's devices, which wait for the step.
  """

  def __init__(self, world: base.World):
    """Compiles the verifier, so that the first request need not wait for it."""
    self.parts = world.parts
    self._world = world
    self._compiled = jax.jit(world.verify)
    blank = np.zeros((*world.canvas, 3), np.uint8)
    self._verify([blank], world.records("heldout")[:1])

  def check(self, prompt: records.Prompt) -> None:
    """Checks that a prompt is one of the world's, see `outcome.HostReward`."""
    self._world.encode([prompt])

  def score(
    self, images: np.ndarray, prompts: Sequence[records.Prompt]
  ) -> list[outcome.Outcome]:
    """Scores images; those of another size or of an unknown prompt are invalid."""
    results: dict[int, outcome.Outcome] = {}
    # Rows of the images that the verifier can score.
    rows = []
    for row, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
      problem = self._problem(image, prompt)
      if problem:
        results[row] = outcome.Invalid(problem)
      else:
        rows.append(row)
    verified = self._verify(
      [images[row] for row in rows], [prompts[row] for row in rows]
    )
    for row, result in zip(rows, verified, strict=True):
      results[row] = result
    return [results[row] for row in range(len(images))]

  def _problem(self, image: np.ndarray, prompt: records.Prompt) -> str:
    """Returns why an image cannot be scored, else ""."""
    height, width = self._world.canvas
    if image.shape != (height, width, 3):
      return f"an image must be {height} x {width} pixels; got {image.shape}"
    try:
      self.check(prompt)
    except ValueError as error:
      return f"the record cannot be judged: {error}"
    return ""

  def _verify(
    self, images: list[np.ndarray], prompts: list[records.Prompt]
  ) -> list[outcome.Outcome]:
    results = []
    for start in range(0, len(images), _BATCH):
      rows = slice(start, start + _BATCH)
      results += self._verify_batch(images[rows], prompts[rows])
    return results

  def _verify_batch(
    self, images: list[np.ndarray], prompts: list[records.Prompt]
  ) -> list[outcome.Outcome]:
    """Verifies up to _BATCH images; the first one fills the rest of the batch."""
    num_missing = _BATCH - len(images)
    padded_images = np.stack(images + images[:1] * num_missing)
    target = self._world.encode(prompts + prompts[:1] * num_missing)
    scores = jax.device_get(self._compiled(padded_images, target))
    results = []
    for row in range(len(images)):
      parts = {name: float(scores.parts[name][row]) for name in self.parts}
      results.append(outcome.Ok(float(scores.value[row]), parts))
    return results

  def describe(self) -> dict:
    """Returns the world and the facts of its verifier, see `outcome.HostReward`."""
    facts = {"model": f"{self._world.name} verifier"}
    return facts | dict(self._world.verifier_facts)

  def metrics(self) -> dict[str, float]:
    """Returns no metrics, see `outcome.HostReward`."""
    return {}


class GenEval:
  """GenEval's rules on the objects of a detector, see `geneval.py` and `detector.py`."""

  parts = ("correct", "strict")

  def __init__(
    self,
    detector: detectors.Detector,
    thresholds: geneval.Thresholds = geneval.OFFICIAL,
  ):
    """Scores by a detector's objects.

    Args:
      detector: finds the objects.
      thresholds: what counts as an object and as a relation.
    """
    self._detector = detector
    self._thresholds = thresholds

  def check(self, prompt: records.Prompt) -> None:
    """Checks that the rules can judge a prompt's images, see `outcome.HostReward`."""
    geneval.check_prompt(prompt)

  def score(
    self, images: np.ndarray, prompts: Sequence[records.Prompt]
  ) -> list[outcome.Outcome]:
    """Scores images; those of prompts that the rules do not know are invalid."""
    return [
      self._score_image(image, prompt)
      for image, prompt in zip(images, prompts, strict=True)
    ]

  def _score_image(
    self, image: np.ndarray, prompt: records.Prompt
  ) -> outcome.Outcome:
    try:
      self.check(prompt)
    except ValueError as error:
      return outcome.Invalid(f"the record cannot be judged: {error}")
    detections = self._detector.detect(image, prompt)
    verdict = geneval.judge(prompt, detections, self._thresholds)
    return outcome.Ok(
      score=verdict.score,
      parts={
        "correct": float(verdict.correct),
        "strict": float(verdict.strict),
      },
      detail={
        "reasons": list(verdict.reasons),
        "detections": [
          dataclasses.asdict(detection) for detection in detections
        ],
      },
    )

  def describe(self) -> dict:
    """Returns the models and the thresholds, see `outcome.HostReward`."""
    return {
      "model": self._detector.name,
      "thresholds": dataclasses.asdict(self._thresholds),
    }

  def metrics(self) -> dict[str, float]:
    """Returns no metrics, see `outcome.HostReward`."""
    return {}


class Ocr:
  """The text that a reader finds in an image, see `ocr.py` and `text_reader.py`."""

  parts = ocr.PARTS

  def __init__(self, reader: text_reader.TextReader):
    """Scores by what a reader reads, several images at a time."""
    self._reader = reader
    num_threads = min(os.cpu_count() or 1, MOST_READERS)
    self._threads = futures.ThreadPoolExecutor(num_threads)

  def check(self, prompt: records.Prompt) -> None:
    """Checks that a prompt asks for a text, see `outcome.HostReward`."""
    ocr.check_prompt(prompt)

  def score(
    self, images: np.ndarray, prompts: Sequence[records.Prompt]
  ) -> list[outcome.Outcome]:
    """Scores images; one that cannot be read has failed, one without inscription is invalid."""
    return list(self._threads.map(self._score_image, images, prompts))

  def _score_image(
    self, image: np.ndarray, prompt: records.Prompt
  ) -> outcome.Outcome:
    try:
      self.check(prompt)
    except ValueError as error:
      return outcome.Invalid(f"the record cannot be judged: {error}")
    try:
      boxes = self._reader.read(image)
    except text_reader.ReadingError as error:
      return outcome.Failed(str(error))
    return ocr.judge(prompt.inscription or "", boxes)

  def describe(self) -> dict:
    """Returns what reads, see `outcome.HostReward`."""
    return self._reader.identity

  def metrics(self) -> dict[str, float]:
    """Returns no metrics, see `outcome.HostReward`."""
    return {}


class Preference:
  """A model of preferences, see `preferences.py`; its numbers are mapped to [0, 1]."""

  parts = ("strict",)

  def __init__(self, model: preferences.Preference):
    """Scores by a loaded model."""
    self._model = model

  def check(self, prompt: records.Prompt) -> None:
    """Accepts every prompt, see `outcome.HostReward`."""
    del prompt

  def score(
    self, images: np.ndarray, prompts: Sequence[records.Prompt]
  ) -> list[outcome.Outcome]:
    """Scores images; one whose number is outside of the span has failed."""
    results = []
    for start in range(0, len(images), _BATCH):
      rows = slice(start, start + _BATCH)
      texts = [prompt.text for prompt in prompts[rows]]
      numbers = self._model.rate(images[rows], texts)
      results += [self._outcome(float(number)) for number in numbers]
    return results

  def _outcome(self, number: float) -> outcome.Outcome:
    least, most = self._model.span
    # Not clipped: that would hide a wrong span.
    if not least <= number <= most:
      return outcome.Failed(
        f"the model's number must be in {least} to {most} (--span); got {number:.4g}"
      )
    score = (number - least) / (most - least)
    return outcome.Ok(score, {"strict": float(score == 1)}, {"number": number})

  def describe(self) -> dict:
    """Returns the model and its span, see `outcome.HostReward`."""
    return self._model.identity

  def metrics(self) -> dict[str, float]:
    """Returns no metrics, see `outcome.HostReward`."""
    return {}


def load(
  name: str,
  detector: str,
  clip: str,
  thresholds: geneval.Thresholds,
  options: preferences.Options = _NO_OPTIONS,
) -> GenEval | Ocr | Preference | Verifier:
  """Returns a reward for a server.

  Args:
    name: one of NAMES.
    detector: folder or name of the detector that GenEval's rules need.
    clip: folder or name of the colour classifier that they need.
    thresholds: what counts as an object and as a relation by GenEval's rules.
    options: of a model of preferences.

  Raises:
    ValueError: the models cannot be loaded.
  """
  if name == "geneval":
    return GenEval(detectors.load(detector, clip), thresholds)
  if name == "ocr":
    return Ocr(text_reader.load())
  if name in preferences.KINDS:
    return Preference(preferences.load(name, options))
  return Verifier(registry.find(name))

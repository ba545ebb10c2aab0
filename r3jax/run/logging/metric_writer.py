"""Writes a run's metrics, evaluations and pictures to all of its sinks."""

from collections.abc import Mapping, Sequence
import typing

import numpy as np

from r3jax.run.logging import sinks


class MetricWriter:
  """Writes to every sink; only process 0 has any, see `sinks.open_all`."""

  def __init__(self, opened: Sequence[sinks.Sink]):
    """Takes over the sinks.

    Args:
      opened: Open sinks; `close` closes them.
    """
    self._sinks = opened

  def write(self, step: int, metrics: Mapping[str, typing.Any]) -> None:
    """Writes the metrics of an iteration.

    Args:
      step: Number of the iteration.
      metrics: Scalars by name: numbers, or numpy or JAX arrays with one element.
    """
    scalars = {
      name: float(np.asarray(value)) for name, value in sorted(metrics.items())
    }
    for sink in self._sinks:
      sink.scalars(step, scalars)

  def write_evaluation(self, step: int, scores: Mapping[str, float]) -> None:
    """Writes the scores of an evaluation.

    A resumed run also writes those of the evaluations that it does not repeat.

    Args:
      step: Number of completed iterations.
      scores: Numbers by name.
    """
    for sink in self._sinks:
      sink.evaluation(step, scores)

  def write_pictures(
    self, step: int, pictures: Mapping[str, sinks.Picture]
  ) -> None:
    """Writes the pictures of an iteration, after its metrics."""
    for sink in self._sinks:
      sink.pictures(step, pictures)

  def close(self) -> None:
    """Flushes and closes every sink."""
    for sink in self._sinks:
      sink.close()

"""Writes a run's metrics to metrics.jsonl and TensorBoard, and says how far it is."""

from collections.abc import Callable, Mapping
import math
import time
from typing import Any

from absl import logging
from etils import epath
import jax
import numpy as np

from r3jax.io import jsonl


class MetricWriter:
  """Writes metrics from process 0; on the others every method does nothing.

  metrics.jsonl holds one object a step, {"step": k, name: number or null, ...}, and after a
  restart equals that of an uninterrupted run.
  """

  def __init__(self, workdir: epath.PathLike, restored_step: int | None):
    """Opens the files.

    Args:
      workdir: the run's folder.
      restored_step: the step that the run goes on from; lines of later steps are dropped. None if
        it starts from the beginning: all lines are dropped.
    """
    self._path = epath.Path(workdir) / "metrics.jsonl"
    self._is_active = jax.process_index() == 0
    if self._is_active:
      self._path.parent.mkdir(parents=True, exist_ok=True)
      jsonl.drop_after(self._path, restored_step)
      self._tensorboard = _open_tensorboard(self._path.parent)

  def write(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Writes the scalars of a step; NaN and infinities become null."""
    if not self._is_active:
      return
    scalars = {name: float(np.asarray(value)) for name, value in sorted(metrics.items())}
    numbers = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
    jsonl.append(self._path, [{"step": step} | numbers])
    if self._tensorboard:
      self._tensorboard.write_scalars(step, scalars)

  def close(self) -> None:
    """Completes what is still being written."""
    if self._is_active and self._tensorboard:
      self._tensorboard.close()


class Progress:
  """Logs, from process 0, how far a run is and when it will be done."""

  def __init__(self, total_steps: int, done_steps: int = 0,
               clock: Callable[[], float] = time.monotonic):
    """Starts the clock.

    Args:
      total_steps: iterations of the whole run.
      done_steps: iterations of an earlier session that this one goes on from.
      clock: returns seconds.
    """
    self._total_steps, self._clock = total_steps, clock
    self._last = (done_steps, clock())  # (step, time) of the last report.
    self._warm = None                   # The same of the first one: by then all is compiled.

  def report(self, step: int, rewards: Mapping[str, float]) -> str:
    """Logs and returns the line of a step: rewards, seconds per iteration and the time left.

    The time left rests on the mean of the session's iterations without the first, which compiles.
    """
    now = (step, self._clock())
    seconds = _seconds_per_step(self._last, now)
    mean_seconds = _seconds_per_step(self._warm, now) if self._warm else seconds
    self._last, self._warm = now, self._warm or now
    numbers = "".join(f"{name} {value:.3f}  " for name, value in rewards.items())
    line = (f"iteration {step}/{self._total_steps}  {numbers}{seconds:.2f} s/it  "
            f"ETA {_clock_time(mean_seconds * (self._total_steps - step))}")
    if jax.process_index() == 0:
      logging.info("%s", line)
    return line


def _seconds_per_step(start: tuple[int, float], end: tuple[int, float]) -> float:
  return (end[1] - start[1]) / (end[0] - start[0])


def _open_tensorboard(workdir: epath.Path) -> Any:
  """Returns a CLU writer of TensorBoard files, or None where TensorFlow is not installed."""
  try:
    from clu import metric_writers  # Here, for it imports TensorFlow, which takes seconds.
  except ImportError as error:
    logging.info("metrics go to metrics.jsonl only, not to TensorBoard: %s", error)
    return None
  return metric_writers.AsyncWriter(metric_writers.SummaryWriter(str(workdir / "tensorboard")))


def _clock_time(seconds: float) -> str:
  """Returns h:mm:ss."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}"

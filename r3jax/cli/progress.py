"""Progress bars of the commands."""

import numpy as np
import tqdm


class ShareBar:
  """A progress bar over a share of something, up to 1."""

  def __init__(self, title: str):
    self._title = title
    self._bar: tqdm.tqdm | None = None

  def __call__(self, share: float) -> None:
    """Moves the bar to a share in [0, 1]."""
    if self._bar is None:
      self._bar = tqdm.tqdm(
        total=100,
        desc=self._title,
        bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}",
      )
    self._bar.update(100 * share - self._bar.n)
    if share >= 1:
      self._bar.close()


class StepBar:
  """A progress bar over the sampling steps of an image, for one image after the other."""

  def __init__(self, num_steps: int):
    self._num_steps = num_steps
    self._bar: tqdm.tqdm | None = None

  def __call__(self, unused_step: np.ndarray) -> None:
    """Moves the bar by a step; steps may arrive out of order."""
    if self._bar is None:
      self._bar = tqdm.tqdm(
        total=self._num_steps, desc="drawing", leave=False, disable=None
      )
    self._bar.update(1)
    if self._bar.n >= self._num_steps:
      self._bar.close()
      self._bar = None

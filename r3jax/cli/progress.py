"""Progress bars of the commands."""

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

"""Tests of run/logging/report_samples.py."""

import numpy as np

from r3jax.evaluation import sample_log
from r3jax.run.logging import report_samples


class TestPictures:
  def test_edits_are_side_by_side(self):
    black, white = (
      np.zeros((6, 5, 3), np.uint8),
      np.full((6, 5, 3), 255, np.uint8),
    )

    def turn(image, score, instruction=""):
      return sample_log.Turn(
        image=image, score=score, text="", instruction=instruction, stop=False
      )

    draft = sample_log.Sample(
      step=1,
      key="a",
      prompt="a red ring",
      tag="colors",
      turns=[turn("black", 0.5)],
    )
    edit = sample_log.Sample(
      step=1,
      key="b",
      prompt="a bow",
      tag="counting",
      turns=[turn("black", None), turn("white", 1.0, "remove the ring")],
    )
    pictures = report_samples.pictures(
      [draft, edit, draft], {"black": black, "white": white - 1}
    )
    assert list(pictures) == [
      "reason/sample/1",
      "edit/sample/1",
      "reason/sample/2",
    ]
    assert pictures["reason/sample/1"].caption == "a red ring [colors]: 0.50"
    np.testing.assert_array_equal(pictures["reason/sample/1"].image, black)
    assert (
      pictures["edit/sample/1"].caption
      == "a bow [counting]: missing -> 1.00 (remove the ring)"
    )
    image = pictures["edit/sample/1"].image
    assert image.shape == (6, 14, 3) and not image[:, :5].any()
    assert (image[:, 5:9] == 255).all() and (image[:, 9:] == 254).all()

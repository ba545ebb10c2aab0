"""Tests of run/logging/report_samples.py."""

import types

import numpy as np

from r3jax.data import records
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


class TestWithBoxes:
  PROMPT = records.Prompt.from_json(
    {
      "tag": "two_object",
      "prompt": "a photo of a ring and a heart",
      "include": [
        {"class": "ring", "count": 1},
        {"class": "heart", "count": 1},
      ],
    }
  )

  def sample(self, *scores):
    turns = [
      sample_log.Turn(
        image="", score=score, text="", instruction="", stop=False
      )
      for score in scores
    ]
    sample = sample_log.Sample(
      step=1, key="a", prompt=self.PROMPT.text, tag="two_object", turns=turns
    )
    images = [np.full((2, 2, 3), i, np.uint8) for i in range(len(scores))]
    return report_samples.ReportSample(sample, images, self.PROMPT)

  def test_images_that_are_not_right_have_a_reason(self):
    def boxes(images):
      ring = {"label": "red ring", "box": [0, 0, 1, 1]}
      heart = {"label": "red heart", "box": [0, 0, 1, 1]}
      return [[ring] if image.max() == 0 else [ring, heart] for image in images]

    samples = [self.sample(0.5), self.sample(0.5, 1.0), self.sample(None)]
    explained = report_samples.with_boxes(
      samples, types.SimpleNamespace(boxes=boxes)
    )
    reasons = [
      [turn.reason for turn in shown.sample.turns] for shown in explained
    ]
    assert reasons == [["missing: heart"], ["missing: heart", None], [None]]
    labels = [box["label"] for box in explained[1].sample.turns[1].boxes]
    assert labels == ["red ring", "red heart"]

  def test_without_a_world_nothing_is_known(self):
    samples = [self.sample(0.5)]
    assert report_samples.with_boxes(samples, None) == samples
    silent = types.SimpleNamespace(boxes=None)
    assert report_samples.with_boxes(samples, silent) == samples

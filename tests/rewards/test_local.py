"""Tests of rewards/serving/local.py and detector.py; the models themselves are scripted."""

import sys

import numpy as np
import pytest

from r3jax.data import records
from r3jax.rewards import outcome
from r3jax.rewards.serving import detector as detector_lib
from r3jax.rewards.serving import local
from r3jax.worlds.shapes import prompts
from r3jax.worlds.shapes import world

ATTR = records.Prompt.from_json(
  {
    "tag": "color_attr",
    "prompt": "a photo of a red computer mouse and a blue cat",
    "include": [
      {"class": "computer mouse", "count": 1, "color": "red"},
      {"class": "cat", "count": 1, "color": "blue"},
    ],
  }
)
TWO = records.Prompt.from_json(
  {
    "tag": "two_object",
    "prompt": "a photo of a bench and a cat",
    "include": [{"class": "bench", "count": 1}, {"class": "cat", "count": 1}],
  }
)


def box(left, size=20):
  return {"xmin": left, "ymin": 10, "xmax": left + size, "ymax": 10 + size}


@pytest.fixture
def scripted():
  """A detector of a mouse, a cat, a dog and an empty cat; red is left of x = 50, blue right."""
  image = np.zeros((60, 100, 3), np.uint8)
  image[:, :50, 0] = image[:, 50:, 2] = 255
  asked = []

  def find(picture, names):
    asked.append(names)
    labels = [
      ("mouse", 0.9, box(5)),
      ("cat", 0.8, box(70)),
      ("dog", 0.99, box(5)),
      ("cat", 0.2, box(70, 0)),
    ]
    return [
      {"label": label, "score": score, "box": place}
      for label, score, place in labels
    ]

  def classify(crop, labels):
    red, _, blue = np.asarray(crop, float).mean(axis=(0, 1))
    return [
      {
        "label": label,
        "score": {"red": red, "blue": blue}.get(label.split()[0], 0),
      }
      for label in labels
    ]

  return detector_lib.Detector("scripted", find, classify), image, asked


class TestDetector:
  def test_finds_what_the_record_names_with_colours(self, scripted):
    detector, image, asked = scripted
    found = detector.detect(image, ATTR)
    assert [(one.class_name, one.confidence, one.color) for one in found] == [
      ("computer mouse", 0.9, "red"),
      ("cat", 0.8, "blue"),
      ("cat", 0.2, None),
    ]
    assert found[0].box == (5, 10, 25, 30)
    assert asked == [["cat", "computer mouse"]]

  def test_colour_is_not_asked_where_none_is_named(self, scripted):
    detector, image, _ = scripted
    assert [one.color for one in detector.detect(image, TWO)] == [None, None]

  def test_missing_extra_is_named(self, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
      ValueError, match=r"a detector needs `pip install r3jax\[detector\]`"
    ):
      detector_lib.load("owl", "clip")

  def test_missing_model_is_refused(self):
    with pytest.raises(ValueError, match="need --detector and --clip"):
      detector_lib.load("", "")


class TestGenEval:
  def test_scores_come_from_the_rules(self, scripted):
    detector, image, _ = scripted
    reward = local.GenEval(detector)
    right, wrong = reward.score(np.stack([image] * 2), [ATTR, TWO])
    assert (right.score, right.parts) == (1, {"correct": 1, "strict": 1})
    assert (wrong.score, wrong.parts) == (0.5, {"correct": 0, "strict": 0})
    assert wrong.detail["reasons"] == ["expected at least 1 bench, found 0"]
    assert reward.describe()["thresholds"]["counting_confidence"] == 0.9

  def test_record_that_cannot_be_judged_is_invalid(self, scripted):
    detector, image, _ = scripted
    region = records.Expectation("cow", 1, region="left")
    found = local.GenEval(detector).score(
      np.stack([image] * 2),
      [records.Prompt("t", "p", (region,)), records.Prompt("t", "p")],
    )
    assert all(
      isinstance(one, outcome.Invalid)
      and "the record cannot be judged" in one.reason
      for one in found
    )


class TestVerifier:
  def test_many_images_are_scored_in_batches(self):
    found = local.Verifier(world.WORLD).score(
      np.zeros((35, 48, 48, 3), np.uint8), prompts.heldout_records()[:35]
    )
    assert len(found) == 35 and all(one.score == 0 for one in found)

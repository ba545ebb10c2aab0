"""Tests of the held-out scores of a model in training, and of its card."""

import numpy as np
import pytest

from configs import r3_geneval
from configs import sft_shapes
from r3jax.run import model_setup
from r3jax.run import stage_settings
from r3jax.sft import card
from r3jax.sft import curves
from r3jax.sft import small_bagel
from r3jax.sft import stages
from r3jax.worlds.shapes import labelled_set
from r3jax.worlds.shapes import prompts

INSIDE = {
  "step": 100,
  "draft": 0.7,
  "draft/position": 0.2,
  "edit": 0.95,
  "edit/position": 0.5,
  "untouched/position": 0.99,
  "judgement/position": 0.7,
  "answer/count": 0.8,
  "stop_when_right": 0.9,
}
START = {
  "command": "launch/sft.py --out=DIR",
  "commit": "0123abc",
  "date": "2026-11-29 20:00 UTC",
  "machine": "a host",
}


def _window() -> curves.Window:
  return curves.Window(**sft_shapes.get_config().window)


class TestWindow:
  def test_tags_matter_for_judgement_alone(self):
    assert _window().holds(INSIDE)

  @pytest.mark.parametrize(
    "name,value",
    [
      ("draft", 0.59),
      ("draft", 0.76),
      ("edit", 0.89),
      ("judgement/position", 0.59),
      ("judgement/position", 0.81),
      ("answer/count", 0.86),
    ],
  )
  def test_names_what_is_outside(self, name, value):
    assert _window().outside(INSIDE | {name: value}) == [name]


class TestSettings:
  def test_are_those_of_the_evaluation(self):
    config = r3_geneval.get_config("shapes")
    config.eval.points = 12
    model = model_setup.build(config)
    expected = stage_settings.for_evaluation(config, model.rollout)
    tokenizer = model.pretrained.tokenizer
    settings = small_bagel.settings(tokenizer, model.modules.towers, points=12)
    for name in ("reason_text", "reflect_text"):
      assert getattr(settings, name) == getattr(expected, name)
    for name in ("reason_flow", "refine_flow"):
      flow = getattr(settings, name)
      assert flow.schedule == getattr(expected, name).schedule
      assert flow.guidance == getattr(expected, name).guidance


class TestRendered:
  def test_half_of_every_tag_is_right(self):
    # As many as the shipped set has, so that both tests compile one program.
    count = labelled_set.NUM_RENDERED
    images = labelled_set.rendered(count, seed=1)
    for tag in prompts.TAGS:
      matches = [image.matches for image in images if image.tag == tag]
      assert (len(matches), sum(matches)) == (2 * count, count)
    heldout = {record.text for record in prompts.heldout_records()}
    assert {image.prompt for image in images} <= heldout
    again = labelled_set.rendered(count, seed=1)
    np.testing.assert_array_equal(images[-1].pixels, again[-1].pixels)


class TestCard:
  @staticmethod
  def _text(tmp_path, scores) -> str:
    records = {
      "text": stages.Record(100, 20.0, 30.0, True),
      "joint": stages.Record(200, 60.4, 90.0, True, scores=[INSIDE, scores]),
    }
    path = tmp_path / "README.md"
    card.write(path, sft_shapes.get_config(), records, START)
    return path.read_text()

  def test_holds_command_times_and_curves(self, tmp_path):
    text = self._text(tmp_path, INSIDE | {"step": 200})
    assert START["command"] in text and START["commit"] in text
    assert "| joint | 200 | 60 | 90 |" in text
    assert "The model is inside its window" in text
    assert "| step | draft | position |\n" in text
    assert "| 200 | 0.700 | 0.200 |" in text
    assert "| step | stop_when_right |" in text

  def test_names_what_is_outside(self, tmp_path):
    text = self._text(tmp_path, INSIDE | {"step": 200} | {"edit": 0.5})
    assert "edit 0.500" in text and "Outside the window" in text

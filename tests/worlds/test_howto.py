"""Runs the code of docs/howto/add_a_world.md."""

import sys

import jax
import numpy as np
import pytest

from configs import r3_geneval
from r3jax.parallel import meshes
from r3jax.run import evaluation_setup
from r3jax.run import setup
from r3jax.worlds import registry
from tests import pages


@pytest.fixture(name="squares")
def fixture_squares(tmp_path, monkeypatch):
  """Writes the page's code to the module that it names, and returns its world."""
  code = pages.code_blocks("howto/add_a_world.md", "python")
  (tmp_path / "squares.py").write_text("\n\n".join(code))
  monkeypatch.syspath_prepend(tmp_path)
  yield registry.find("squares:WORLD")
  sys.modules.pop("squares", None)


def _image(color) -> np.ndarray:
  image = np.full((48, 48, 3), 240, np.uint8)
  image[16:32, 16:32] = color
  return image


class TestWorld:
  def test_verifier_scores_what_was_asked_for(self, squares):
    red, blue = (235, 30, 10), (10, 70, 235)
    images = np.stack([_image(red), _image(blue), _image((235, 60, 10))])
    target = squares.encode([squares.records("train")[0]] * 3)
    score = jax.device_get(jax.jit(squares.verify)(images, target))
    assert score.valid.all()
    assert score.parts["strict"].tolist() == [1, 0, 0]
    # The least right channels differ by 225 and by 30 of 255.
    expected = [1, 1 - 225 / 255, 1 - 30 / 255]
    np.testing.assert_allclose(score.value, expected, atol=1e-6)

  def test_prompts_of_another_world_are_refused(self, squares):
    with pytest.raises(ValueError, match="must ask for one of"):
      squares.encode(registry.find("shapes").records("train")[-1:])

  def test_sees_and_asks(self, squares):
    images = np.stack([_image((10, 80, 220))])
    assert squares.boxes(images)[0][0]["label"] == "blue square"
    (seen,) = squares.quiz.see(images)
    rng = np.random.default_rng(0)
    assert squares.quiz.kinds["color"](seen, rng)[1] == "blue"


class TestRun:
  def test_is_built_by_the_config(self, squares):
    config = r3_geneval.get_config("shapes").unlock()
    config.world = "squares:WORLD"
    config.eval.ask = ("match", "color")
    config.eval.prompts = config.eval.batch_size = 2
    experiment = setup.build(config)
    assert experiment.world is squares
    assert len(experiment.train) == 2
    assert experiment.heldout[0].text == "a photo of a blue square"
    assert experiment.encode(experiment.train).target.tolist() == [0, 1]
    mesh = meshes.make_mesh_on(jax.devices()[:1], 1, 1, 1)
    evaluation = evaluation_setup.build(config, experiment, mesh)
    assert evaluation.boxes is squares.boxes
    assert evaluation.settings["heldout"]["source"] == "squares:WORLD"

  def test_images_must_have_the_size_of_the_canvas(self, squares):
    config = r3_geneval.get_config("shapes").unlock()
    config.world = "squares:WORLD"
    config.image.height = 32
    with pytest.raises(ValueError, match="must be the canvas of the world"):
      setup.build(config)

"""Tests of worlds/registry.py, and of what configs call "world"."""

import pytest

from configs import r3_geneval
from r3jax.checkpoint import pretrained
from r3jax.files import config_guard
from r3jax.worlds import base
from r3jax.worlds import registry
from r3jax.worlds.shapes import prompts
from r3jax.worlds.shapes import world


class TestFind:
  def test_registered_name(self):
    assert registry.find("shapes") is world.WORLD
    assert set(registry.REGISTERED) == {"shapes"}

  def test_module_and_attribute(self):
    assert registry.find("r3jax.worlds.shapes.world:WORLD") is world.WORLD

  @pytest.mark.parametrize(
    "name, message",
    [
      ("shape", "must be one of .'shapes'. or 'package.module:ATTRIBUTE'"),
      ("", "must be one of"),
      ("nowhere.to_be_found:WORLD", "the module nowhere.to_be_found must be"),
      ("r3jax.worlds.base:WORLD", "r3jax.worlds.base must define WORLD"),
      ("r3jax.worlds.shapes.scenes:GRID", "must name a .*World.* is a int"),
    ],
  )
  def test_what_is_no_world_is_refused(self, name, message):
    with pytest.raises(ValueError, match=message):
      registry.find(name)


class TestWorld:
  def test_strict_is_among_the_parts(self):
    with pytest.raises(ValueError, match="must hold 'strict'"):
      base.World("w", (8, 8), list, list, lambda i, t: None, ("correct",))

  def test_records_are_those_of_the_prompts(self):
    assert world.WORLD.records("train") == prompts.train_records()
    assert world.WORLD.records("heldout") == prompts.heldout_records()


class TestModelOfAWorld:
  def test_comes_with_the_world(self):
    assert pretrained.find("world", "shapes").folder.name == "shapes"

  @pytest.mark.parametrize(
    "folder, name, message",
    [
      ("world", "", "model.folder is 'world', so config.world must name"),
      ("", "shapes", "model.folder must name a folder .* it is empty"),
      ("world", "cubes", "must be one of"),
    ],
  )
  def test_without_one_it_is_refused(self, folder, name, message):
    with pytest.raises(ValueError, match=message):
      pretrained.find(folder, name)


class TestRunsFromBeforeTheKeyWorld:
  """Their configs have no `world`, and `model.folder` named the world itself."""

  def _config(self) -> dict:
    config = r3_geneval.get_config("shapes").unlock()
    config.model.folder = config.data.train = "shapes"
    config.data.heldout = config.reward.name = "shapes"
    del config.world
    return config.to_dict()

  def test_are_not_resumed(self, tmp_path):
    config_guard.write_or_check(tmp_path, self._config(), ())
    config = r3_geneval.get_config("shapes").to_dict()
    with pytest.raises(ValueError, match="these keys differ") as error:
      config_guard.write_or_check(tmp_path, config, ())
    assert 'world: <missing> there, "shapes" now' in str(error.value)
    assert 'model.folder: "shapes" there, "world" now' in str(error.value)

  def test_are_models_to_start_from(self):
    assert pretrained.model_of_run(self._config()) == ("world", "shapes")

  def test_newer_ones_say_both(self):
    config = {"model": {"folder": "shapes"}, "world": ""}
    assert pretrained.model_of_run(config) == ("shapes", "")

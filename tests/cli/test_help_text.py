"""Tests of reading the comments of a config file."""

import ml_collections

from r3jax.cli import help_text

SOURCE = """
import ml_collections

ConfigDict = ml_collections.ConfigDict


def get_config():
  config = ConfigDict()
  config.seed = 0
  config.total_steps = 500  # iterations
  # two lines
  # above
  config.model = ConfigDict(
    dict(
      folder="",  # behind
      # of the adapters
      lora=dict(
        rank=0,  # 0 trains all
        targets=("q", "k"),
      ),
      sizes=(
        1,
        2,
      ),  # at the end
      # both on one line
      client=dict(attempts=4, pause=0.5),
    )
  )
  text = config.text = ConfigDict()
  text.batch_size = 64  # examples
  config.update(ignored=1)
  return config
"""


class TestKeyComments:
  def test_are_those_behind_and_above(self, tmp_path):
    path = tmp_path / "config.py"
    path.write_text(SOURCE)
    assert help_text.key_comments([path]) == {
      "total_steps": "iterations",
      "model": "two lines above",
      "model.folder": "behind",
      "model.lora": "of the adapters",
      "model.lora.rank": "0 trains all",
      "model.sizes": "at the end",
      "model.client": "both on one line",
      "text.batch_size": "examples",
    }

  def test_every_comment_of_the_shipped_config_belongs_to_a_key(self):
    lines = help_text.of_config("r3_geneval:shapes", {}).splitlines()
    keys = [line for line in lines if line.startswith("  --config.")]
    assert len(keys) > 100
    assert len(lines) > 1.3 * len(keys)


class TestItems:
  def test_values_come_before_sections(self):
    config = ml_collections.ConfigDict({"a": {"c": 1, "d": {}}, "b": (1,)})
    assert list(help_text.items(config)) == [
      ("b", (1,)),
      ("a", config.a),
      ("a.c", 1),
      ("a.d", config.a.d),
    ]

"""Tests of data/benchmarks.py."""

from r3jax.data import benchmarks
from r3jax.worlds.shapes import prompts


class TestBenchmarks:
  def test_number_of_tags(self):
    counts = {
      name: len(set(each.tags)) for name, each in benchmarks.BENCHMARKS.items()
    }
    assert counts == {"geneval": 6, "geneval_plus": 7, "tiif": 39}

  def test_tiif_combines_skills(self):
    tags = benchmarks.BENCHMARKS["tiif"].tags
    assert {
      "texture+color",
      "color+texture",
      "shape+color",
      "action+2d",
    } <= set(tags)
    assert not {"color+color", "color+shape", "2d+3d"} & set(tags)

  def test_embedded_world_has_the_tags_of_geneval(self):
    assert benchmarks.BENCHMARKS["geneval"].tags == prompts.TAGS

"""Tests of data/benchmarks.py."""

import pytest

from r3jax.data import benchmarks
from r3jax.worlds.shapes import prompts


class TestBenchmarks:
  def test_number_of_tags(self):
    counts = {
      name: len(set(each.tags)) for name, each in benchmarks.BENCHMARKS.items()
    }
    assert counts == {
      "geneval": 6,
      "geneval_plus": 7,
      "tiif": 39,
      "ocr": 4,
    }

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


MINE = benchmarks.Benchmark("mine", ("a", "b"))


class TestFind:
  def test_name_or_path_finds_a_benchmark(self):
    assert benchmarks.find("tiif") is benchmarks.BENCHMARKS["tiif"]
    assert benchmarks.find("tests.data.test_benchmarks:MINE").name == "mine"

  @pytest.mark.parametrize(
    "name, message",
    [
      (
        "geneval++",
        "data.benchmark must be one of .'geneval', 'geneval_plus', 'ocr', 'tiif'. or "
        "'package.module:ATTRIBUTE'; got 'geneval..'",
      ),
      ("tests.data.nowhere:MINE", "the module tests.data.nowhere must be"),
      (
        "tests.data.test_benchmarks:YOURS",
        "tests.data.test_benchmarks must define YOURS; it does not",
      ),
      (
        "tests.data.test_benchmarks:TestFind",
        "data.benchmark must name a benchmarks.Benchmark; .* is a type",
      ),
    ],
  )
  def test_name_of_no_benchmark_is_refused(self, name, message):
    with pytest.raises(ValueError, match=message):
      benchmarks.find(name)

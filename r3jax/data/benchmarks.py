"""The benchmarks whose prompts r3jax reads: their names and tags."""

import dataclasses

_TIIF_BASICS = (
  "2d_spatial_relation",
  "3d_spatial_relation",
  "comparison",
  "differentiation",
  "negation",
  "numeracy",
  "style",
  "text",
  "real_world",
)
_TIIF_PAIRS = {
  "action": ("2d", "3d", "color", "texture"),
  "color": ("2d", "3d", "texture"),
  "comparison": ("2d", "3d", "color", "texture"),
  "differentiation": ("2d", "3d", "color", "texture"),
  "negation": ("2d", "3d", "color", "texture"),
  "numeracy": ("2d", "3d", "color", "texture"),
  "shape": ("2d", "3d", "color", "texture"),
  "texture": ("2d", "3d", "color"),
}


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """A benchmark.

  Attributes:
    name: how configs and prepared data name it.
    tags: the tasks of its prompts.
  """

  name: str
  tags: tuple[str, ...]


_ALL = (
  Benchmark(
    "geneval",
    (
      "single_object",
      "two_object",
      "counting",
      "colors",
      "position",
      "color_attr",
    ),
  ),
  Benchmark(
    "geneval_plus",
    (
      "color_attr",
      "spatial_count_attr",
      "color_spatial_attr",
      "color_count_attr",
      "multi_object_count_attr",
      "size_spatial_attr",
      "counting",
    ),
  ),
  Benchmark(
    "tiif",
    _TIIF_BASICS
    + tuple(
      f"{first}+{second}"
      for first, seconds in _TIIF_PAIRS.items()
      for second in seconds
    ),
  ),
)
BENCHMARKS = {benchmark.name: benchmark for benchmark in _ALL}

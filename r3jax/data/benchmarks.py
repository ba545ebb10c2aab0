"""The benchmarks whose prompts r3jax reads: their names, tags and generators.

`data.benchmark` names one of BENCHMARKS, or a `Benchmark` of your own as
`package.module:ATTRIBUTE`, see docs/howto/add_a_benchmark.md.
"""

from collections.abc import Callable
import dataclasses

from r3jax import plugins
from r3jax.data import inscriptions
from r3jax.data import records
from r3jax.data.generators import geneval
from r3jax.data.generators import geneval_plus
from r3jax.data.generators import ocr

# (number, seed) -> so many different prompts
Generate = Callable[[int, int], list[records.Prompt]]
# () -> the prompts of the test set
Heldout = Callable[[], list[records.Prompt]]
# A prompt of a file -> the prompt with what its text says.
Complete = Callable[[records.Prompt], records.Prompt]


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """A benchmark.

  Attributes:
    name: its name in configs and in the folders of prepared data.
    tags: the tasks of its prompts.
    generate: draws training prompts of its kind, (number, seed) -> prompts; None where there is no
      generator, so that `data.train` must be a file.
    heldout: generates the test set, always the same prompts; None where `data.heldout` must be a
      file.
    complete: reads out of a prompt's text what a file leaves out; None where there is nothing.
  """

  name: str
  tags: tuple[str, ...]
  generate: Generate | None = None
  heldout: Heldout | None = None
  complete: Complete | None = None


_GENEVAL_TAGS = (
  "single_object",
  "two_object",
  "counting",
  "colors",
  "position",
  "color_attr",
)
_GENEVAL_PLUS_TAGS = (
  "color_attr",
  "spatial_count_attr",
  "color_spatial_attr",
  "color_count_attr",
  "multi_object_count_attr",
  "size_spatial_attr",
  "counting",
)
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
_TIIF_TAGS = _TIIF_BASICS + tuple(
  f"{first}+{second}"
  for first, seconds in _TIIF_PAIRS.items()
  for second in seconds
)

BENCHMARKS = {
  "geneval": Benchmark("geneval", _GENEVAL_TAGS, geneval.generate),
  "geneval_plus": Benchmark(
    "geneval_plus", _GENEVAL_PLUS_TAGS, geneval_plus.generate
  ),
  "tiif": Benchmark("tiif", _TIIF_TAGS),
  "ocr": Benchmark(
    "ocr", ocr.TAGS, ocr.generate, ocr.heldout, inscriptions.completed
  ),
}


def find(name: str) -> Benchmark:
  """Returns the benchmark of a name.

  Args:
    name: one of BENCHMARKS, or `package.module:ATTRIBUTE`.

  Raises:
    ValueError: there is no such benchmark.
  """
  if name in BENCHMARKS:
    return BENCHMARKS[name]
  if not plugins.is_path(name):
    raise ValueError(
      f"data.benchmark must be one of {sorted(BENCHMARKS)} or 'package.module:ATTRIBUTE'; "
      f"got {name!r}"
    )
  benchmark = plugins.load(name, "data.benchmark")
  if not isinstance(benchmark, Benchmark):
    raise ValueError(
      f"data.benchmark must name a benchmarks.Benchmark; {name!r} is a "
      f"{type(benchmark).__name__}"
    )
  return benchmark

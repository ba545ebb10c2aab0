"""The prompts of a run: the training set, the held-out set, and that the two do not overlap."""

from collections.abc import Callable
import dataclasses

from absl import logging

from r3jax.data import benchmarks
from r3jax.data import contamination
from r3jax.data import records
from r3jax.data import sources
from r3jax.data import storage
from r3jax.data import tfds
from r3jax.files import paths

GENERATED = "generated"
BALANCES = ("none", "tag")
OF_WORLD = "world"  # the prompts of `config.world`

# Returns the prompts of a world's split, "train" or "heldout".
WorldRecords = Callable[[str], list[records.Prompt]]


@dataclasses.dataclass(frozen=True)
class Settings:
  """Where prompts come from: the config's section `data`, which has the defaults.

  Attributes:
    benchmark: decides the tags of the files and the generator: one of `benchmarks.BENCHMARKS`, or
      `package.module:ATTRIBUTE` of your own.
    train: a file of prompts (a path or URL), "generated", or "world", the prompts of the world
      that the config names.
    heldout: a file, "generated", which is the benchmark's own test set, or "world".
    generated: number of training prompts where they are generated.
    generated_seed: the seed of the generator.
    more_tests: further files, of any benchmark, whose prompts must not be trained on.
    keep_tags: tags whose training prompts are kept although they are in a test set; the run is then
      called contaminated.
    balance: one of BALANCES: "none" draws every training prompt equally often, "tag" every tag.
  """

  benchmark: str
  train: str
  heldout: str
  generated: int
  generated_seed: int
  more_tests: tuple[str, ...]
  keep_tags: tuple[str, ...]
  balance: str

  def __post_init__(self):
    if self.balance not in BALANCES:
      raise ValueError(
        f"data.balance must be one of {BALANCES}; got {self.balance!r}"
      )


@dataclasses.dataclass(frozen=True)
class PromptSets:
  """The prompts of a run.

  Attributes:
    train: the training set without the prompts that occur in a test set.
    heldout: the whole held-out set.
    contamination: the overlap of the two, and what was done about it.
  """

  train: list[records.Prompt]
  heldout: list[records.Prompt]
  contamination: contamination.Contamination


def load(
  settings: Settings, world_records: WorldRecords | None = None
) -> PromptSets:
  """Loads both sets and drops training prompts that are in a test set.

  Args:
    settings: where prompts come from.
    world_records: those of the config's world, if it names one.

  Raises:
    ValueError: a source is not named or cannot be read, holds an invalid record, or nothing is left
      to train on.
  """
  heldout = load_heldout(settings, world_records)
  tests = list(heldout)
  for source in settings.more_tests:
    tests += _completed(settings, _read_any_benchmark(source))
  if settings.train == GENERATED:
    candidates = _generate(settings)
  else:
    candidates = _read(settings, "train", settings.train, world_records)
  # Generated prompts and worlds are cleaned, too: their spaces contain official test prompts.
  train, overlap = contamination.clean(candidates, tests, settings.keep_tags)
  if len(train) < len(candidates) or overlap.contaminated:
    logging.info(
      "training prompts that are in a test set:\n%s", overlap.describe()
    )
  if overlap.contaminated:
    logging.warning(
      "this run is CONTAMINATED: it trains on prompts of its test set (data.keep_tags)"
    )
  return PromptSets(train, heldout, overlap)


def load_heldout(
  settings: Settings, world_records: WorldRecords | None = None
) -> list[records.Prompt]:
  """Loads the whole held-out set alone; for the arguments see `load`.

  Raises:
    ValueError: it is not named, cannot be read, or holds an invalid record.
  """
  if settings.heldout == GENERATED:
    return _generate_heldout(settings)
  return _read(settings, "heldout", settings.heldout, world_records)


def places(settings: Settings) -> dict[records.Prompt, str]:
  """Returns where prompts stand in the files of a config, "FILE:LINE" by prompt.

  Raises:
    ValueError, OSError: a file has changed since it was loaded.
  """
  folder = storage.downloads(storage.root(None))
  result = {}
  for source in (settings.train, settings.heldout):
    if source in (GENERATED, OF_WORLD, ""):
      continue
    content = sources.read(source, folder)
    numbered = records.parse_numbered(content, source)
    prompts = _completed(settings, [prompt for _, prompt in numbered])
    for (line, _), prompt in zip(numbered, prompts, strict=True):
      result.setdefault(prompt, f"{source}:{line}")
  return result


def _completed(
  settings: Settings, prompts: list[records.Prompt]
) -> list[records.Prompt]:
  """Returns prompts of a file with what the benchmark reads out of their texts."""
  complete = benchmarks.find(settings.benchmark).complete
  if complete is None:
    return prompts
  return [complete(prompt) for prompt in prompts]


def _generate(settings: Settings) -> list[records.Prompt]:
  """Generates the training prompts.

  Raises:
    ValueError: the benchmark has no generator.
  """
  benchmark = benchmarks.find(settings.benchmark)
  if benchmark.generate is None:
    with_generator = sorted(
      other.name for other in benchmarks.BENCHMARKS.values() if other.generate
    )
    raise ValueError(
      f"data.train may be {GENERATED!r} for {with_generator} and for your own benchmark with a "
      f"generator; data.benchmark is {settings.benchmark!r}"
    )
  return benchmark.generate(settings.generated, settings.generated_seed)


def _generate_heldout(settings: Settings) -> list[records.Prompt]:
  """Generates the test set of the benchmark.

  Raises:
    ValueError: the benchmark has none that is generated.
  """
  benchmark = benchmarks.find(settings.benchmark)
  if benchmark.heldout is None:
    with_heldout = sorted(
      other.name for other in benchmarks.BENCHMARKS.values() if other.heldout
    )
    raise ValueError(
      f"data.heldout may be {GENERATED!r} for {with_heldout} and for your own benchmark with a "
      f"generated test set; data.benchmark is {settings.benchmark!r}"
    )
  return benchmark.heldout()


def _read_any_benchmark(source: str) -> list[records.Prompt]:
  """Returns the prompts of a file of any benchmark.

  Raises:
    ValueError: the file cannot be read, holds an invalid record, or holds none.
  """
  try:
    content = sources.read(source, storage.downloads(storage.root(None)))
  except OSError as error:
    raise ValueError(
      f"data.more_tests must name files of prompts that can be read: {error}"
      f"{paths.did_you_mean(source)}"
    ) from error
  prompts = records.parse(content, source)
  if not prompts:  # as after a download that failed
    raise ValueError(
      f"data.more_tests must name files that hold prompts; there is none in {source}"
    )
  return prompts


def _read(
  settings: Settings,
  split: str,
  source: str,
  world_records: WorldRecords | None,
) -> list[records.Prompt]:
  """Returns the prompts of a world's split, or of a file.

  Raises:
    ValueError: there is no world, the file is not named or cannot be read, or it holds an invalid
      record.
  """
  if source == OF_WORLD:
    if world_records is None:
      raise ValueError(
        f"data.{split} is {OF_WORLD!r}, so config.world must name a world; it is empty"
      )
    return world_records(split)
  if not source:
    raise ValueError(
      f"data.{split} must name a file of prompts, as JSON lines or lines of text, or a URL of one; "
      "it is empty"
    )
  try:
    prompts = tfds.load(benchmarks.find(settings.benchmark), source)
  except OSError as error:
    raise ValueError(
      f"data.{split} must name a file of prompts that can be read: {error}"
      f"{paths.did_you_mean(source)}"
    ) from error
  return _completed(settings, prompts)

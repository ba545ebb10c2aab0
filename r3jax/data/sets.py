"""The prompts of a run: what is trained on, what is held out, and that the two do not meet."""

from collections.abc import Callable
import dataclasses

from absl import logging

from r3jax.data import contamination
from r3jax.data import records
from r3jax.data import sources
from r3jax.data import storage
from r3jax.data import tfds
from r3jax.data.generators import geneval
from r3jax.data.generators import geneval_plus

GENERATED = "generated"
OF_WORLD = "world"  # the prompts of `config.world`
_GENERATORS = {
  "geneval": geneval.generate,
  "geneval_plus": geneval_plus.generate,
}


@dataclasses.dataclass(frozen=True)
class Settings:
  """Where prompts come from.

  Attributes:
    benchmark: format and tags of the files: "geneval", "geneval_plus" or "tiif".
    train: a file of JSON lines (a path or URL), "generated", or "world", the prompts of the world
      that the config names.
    heldout: a file, or "world".
    generated: number of training prompts where they are generated.
    generated_seed: of the generator.
    more_tests: further files, of any benchmark, whose prompts must not be trained on.
    keep_tags: tags of which training prompts that are in a test set are kept; the run is then called
      contaminated.
  """

  benchmark: str
  train: str
  heldout: str
  generated: int = 10_000
  generated_seed: int = 0
  more_tests: tuple[str, ...] = ()
  keep_tags: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class PromptSets:
  """Records as `PromptRecord.to_json` gives them.

  Attributes:
    train: without what occurs in a test set.
    heldout: the whole held-out set.
    contamination: what was found in both, and dropped or kept.
  """

  train: list[dict]
  heldout: list[dict]
  contamination: contamination.Contamination


# Returns the records of a world's split, "train" or "heldout".
WorldRecords = Callable[[str], list[dict]]


def load(
  settings: Settings, world_records: WorldRecords | None = None
) -> PromptSets:
  """Loads both sets and drops training prompts that are in a test set.

  Args:
    settings: where prompts come from.
    world_records: of the config's world, if it names one.

  Raises:
    ValueError: a source is not named or not there, holds an invalid record, or nothing is left to
      train on.
  """
  heldout = load_heldout(settings, world_records)
  tests = [_read_any(source) for source in settings.more_tests]
  train = (
    _generate(settings)
    if settings.train == GENERATED
    else _read(settings, "train", settings.train, world_records)
  )
  kept, found = contamination.clean(
    train, sum(tests, heldout), settings.keep_tags
  )
  if len(kept) < len(train) or found.contaminated:
    logging.info(
      "training prompts that are in a test set:\n%s", found.describe()
    )
  if found.contaminated:
    logging.warning(
      "this run is CONTAMINATED: it trains on prompts of its test set (data.keep_tags)"
    )
  return PromptSets(kept, heldout, found)


def load_heldout(
  settings: Settings, world_records: WorldRecords | None = None
) -> list[dict]:
  """Loads the whole held-out set alone; for the arguments see `load`.

  Raises:
    ValueError: it is not named, not there, or holds an invalid record.
  """
  return _read(settings, "heldout", settings.heldout, world_records)


def _generate(settings: Settings) -> list[dict]:
  if settings.benchmark not in _GENERATORS:
    raise ValueError(
      f"data.train may be 'generated' for {sorted(_GENERATORS)}; data.benchmark is {settings.benchmark!r}"
    )
  return _GENERATORS[settings.benchmark](
    settings.generated, settings.generated_seed
  )


def _read_any(source: str) -> list[dict]:
  """Returns the records of a file of any benchmark."""
  try:
    content = sources.read(source, storage.downloads(storage.root(None)))
  except OSError as error:
    raise ValueError(
      f"data.more_tests must name files of prompts that can be read: {error}"
    ) from error
  return [record.to_json() for record in records.parse_jsonl(content, source)]


def _read(
  settings: Settings,
  name: str,
  source: str,
  world_records: WorldRecords | None,
) -> list[dict]:
  if source == OF_WORLD:
    if world_records is None:
      raise ValueError(
        f"data.{name} is {OF_WORLD!r}, so config.world must name a world; it is empty"
      )
    return world_records(name)
  if not source:
    raise ValueError(
      f"data.{name} must name a file of prompts in JSON lines, or a URL of one; it is empty"
    )
  try:
    return tfds.load(settings.benchmark, source)
  except OSError as error:
    raise ValueError(
      f"data.{name} must name a file of prompts that can be read: {error}"
    ) from error

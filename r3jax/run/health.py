"""Watches the numbers of a run: updates that are skipped, ratios that leave 1."""

from collections.abc import Mapping
import dataclasses

from absl import logging
import jax
import ml_collections

# Largest |ratio - 1| of an update above which a run warns. In float32 40 iterations of the main job
# stay below 1e-5, and the tests below 1e-4; in bfloat16 the tests stay below 0.008.
MISMATCH_LIMITS = {"float64": 1e-6, "float32": 1e-3, "bfloat16": 0.05}

SKIPPED = "optimizer/skipped"
_SKIPPED_IN_STAGE = "/skipped"
_MISMATCH = "mismatch/"


class Unhealthy(RuntimeError):
  """The numbers of a run are such that training on means nothing."""


@dataclasses.dataclass(frozen=True)
class Settings:
  """When a run warns, and when it stops.

  Attributes:
    max_skipped: iterations in a row with a skipped update after which it stops.
    mismatch_limit: largest |ratio - 1| of an update that raises no warning; 0 takes that of the
      dtype, see `MISMATCH_LIMITS`.
    mismatch_stop: whether it stops there.
  """

  max_skipped: int
  mismatch_limit: float
  mismatch_stop: bool


def skipped_stages(metrics: Mapping[str, float]) -> list[str]:
  """Returns the stages whose update was skipped because it was not finite: "reason", "edit", ...

  In the full chain, whose stages share one update, they are those that made it so; "chain" alone
  if only their sum is not finite.

  Args:
    metrics: of an iteration, on the host.
  """
  stages = [
    name.removesuffix(_SKIPPED_IN_STAGE)
    for name, value in metrics.items()
    if name.endswith(_SKIPPED_IN_STAGE) and name != SKIPPED and value > 0
  ]
  if stages == ["chain"]:
    return stages
  # Metrics come in no fixed order; an iteration reasons before it edits.
  stages.sort(key=lambda stage: (stage != "reason", stage))
  return [stage for stage in stages if stage != "chain"]


def num_skipped(metrics: Mapping[str, float]) -> float:
  """Returns how many updates of an iteration were skipped because they were not finite."""
  if "chain/skipped" in metrics:
    return float(metrics["chain/skipped"])
  return float(len(skipped_stages(metrics)))


class Watch:
  """Counts what is wrong in consecutive iterations.

  It decides by metrics that are equal on all processes, so that all of them stop together. The
  counts begin anew with every start.
  """

  def __init__(self, settings: Settings, limit: float | None):
    """Begins to watch.

    Args:
      settings: when to warn and to stop.
      limit: largest |ratio - 1| without a warning; None watches no ratio.
    """
    self._settings = settings
    self._limit = limit
    self._skipped_in_a_row = 0
    self._is_mismatched = False

  def add(self, number: int, metrics: Mapping[str, float]) -> None:
    """Adds an iteration.

    Args:
      number: of the iteration, for messages.
      metrics: of the iteration, on the host.

    Raises:
      Unhealthy: the run must not go on.
    """
    self._add_skipped(number, metrics)
    self._add_mismatch(number, metrics)

  def _add_skipped(self, number: int, metrics: Mapping[str, float]) -> None:
    if not num_skipped(metrics):
      self._skipped_in_a_row = 0
      return
    self._skipped_in_a_row += 1
    if self._skipped_in_a_row < self._settings.max_skipped:
      return
    raise Unhealthy(
      "updates must be finite; at least one of every iteration from "
      f"{number - self._skipped_in_a_row + 1} to {number} was skipped "
      f"(health.max_skipped is {self._settings.max_skipped}). The weights are as before them, and "
      "the last checkpoint is whole; `r3jax replay WORKDIR/skipped/"
      f"{folder_name(number)}` shows where the numbers come from"
    )

  def _add_mismatch(self, number: int, metrics: Mapping[str, float]) -> None:
    largest = largest_mismatch(metrics)
    was_mismatched = self._is_mismatched
    self._is_mismatched = bool(self._limit and largest.value > self._limit)
    if not self._is_mismatched:
      return
    message = (
      f"ratios must be 1 up to {self._limit:g} on-policy; {largest.name} of iteration {number} is "
      f"{largest.value:.3g}: what is trained is not what was sampled (docs/howto/debug.md)"
    )
    if self._settings.mismatch_stop:
      raise Unhealthy(f"{message}. health.mismatch_stop ends the run")
    # Once for a run of iterations, and on one process.
    if not was_mismatched and not jax.process_index():
      logging.warning("%s", message)


@dataclasses.dataclass(frozen=True)
class Mismatch:
  """The largest |ratio - 1| of an iteration, and its metric."""

  name: str
  value: float


def largest_mismatch(metrics: Mapping[str, float]) -> Mismatch:
  """Returns the largest finite mismatch of an iteration; 0 where there is none."""
  largest = Mismatch("", 0.0)
  for name, value in metrics.items():
    # NaN is larger than nothing: that update was skipped.
    if name.startswith(_MISMATCH) and value > largest.value:
      largest = Mismatch(name, float(value))
  return largest


def folder_name(number: int) -> str:
  """Returns the name of the folder of an iteration whose update was skipped."""
  return f"step_{number:06d}"


def mismatch_limit(config: ml_collections.ConfigDict) -> float | None:
  """Returns the largest |ratio - 1| that raises no warning; None where all may occur."""
  # Its ratios are not 1 on purpose.
  if config.compat.reference_loss:
    return None
  return config.health.mismatch_limit or MISMATCH_LIMITS[config.model.dtype]


def watch(config: ml_collections.ConfigDict) -> Watch:
  """Returns what watches the run of a config."""
  return Watch(Settings(**config.health), mismatch_limit(config))

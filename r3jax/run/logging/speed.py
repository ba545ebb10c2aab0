"""Computes how fast an iteration was: images, tokens, and the share of the chips' peak."""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

from r3jax.costs import chips
from r3jax.costs import count
from r3jax.rl import iteration
from r3jax.run import sessions


@dataclasses.dataclass(frozen=True)
class Speed:
  """Turns the seconds of an iteration into rates.

  Attributes:
    num_rows: samples of an iteration.
    headings: of the metrics of every stage with a text, one of them per image of a sample.
    shortest_seconds: time of an iteration at the chips' peak; None where that is not known.
  """

  num_rows: int
  headings: tuple[str, ...]
  shortest_seconds: float | None

  def compute(self, metrics: Mapping[str, Any]) -> dict[str, float]:
    """Returns "perf/NAME" of an iteration, given its other metrics."""
    seconds = metrics["seconds/step"]
    num_images = self.num_rows * len(self.headings)
    # The begin token is given.
    num_tokens = self.num_rows * sum(
      float(metrics[f"{heading}/tokens"]) - 1 for heading in self.headings
    )
    rates = {
      "perf/images_per_second": num_images / seconds,
      "perf/tokens_per_second": num_tokens / seconds,
    }
    if self.shortest_seconds is not None:
      rates["perf/mfu"] = self.shortest_seconds / seconds
    return rates


def of(session: sessions.Session) -> Speed:
  """Returns what turns the seconds of a session's iterations into rates."""
  settings = session.stages.settings
  rounds = range(settings.num_reflect_rounds)
  headings = [iteration.numbered("edit", turn) for turn in rounds]
  device = session.mesh.devices.flat[0]
  peak = chips.peak_flops(device.device_kind)
  shortest_seconds = None
  if peak is not None:
    shortest_seconds = _num_operations(session) / (peak * session.mesh.size)
  return Speed(
    num_rows=settings.num_groups * settings.group_size,
    headings=("reason", *headings),
    shortest_seconds=shortest_seconds,
  )


def _num_operations(session: sessions.Session) -> float:
  """Returns the operations of an iteration on all chips together, texts at their longest.

  What is computed twice to save memory counts once, as in every MFU.
  """
  costs = count.iteration(
    session.stages.modules,
    session.stages.rollout,
    session.stages.settings,
    session.mesh.shape,
    remat=False,
    freeze_und=session.config.optimizer.freeze_und,
  )
  return math.fsum(cost.flops for cost in costs.values())

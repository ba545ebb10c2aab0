"""What a run of every program computes: operations, bytes, tokens and images."""

from collections.abc import Mapping
import dataclasses

from r3jax.costs import count
from r3jax.run import sessions

# Programs of whole iterations.
ITERATIONS = ("fused", "split")


@dataclasses.dataclass(frozen=True)
class Workload:
  """What one run of a program computes, on all devices together.

  Attributes:
    cost: operations, and bytes of weights and caches; see `costs.count`.
    tokens: text tokens that it samples.
    images: images that it draws, decodes, looks at or learns from.
  """

  cost: count.Cost
  tokens: int = 0
  images: int = 0


def of_programs(session: sessions.Session) -> dict[str, Workload]:
  """Returns the workload of every program of a benchmark, by name."""
  config = session.config
  settings = session.stages.settings
  capacities = session.stages.rollout.capacities
  groups = settings.num_groups
  rows = groups * settings.group_size
  costs = count.iteration(
    session.stages.modules,
    session.stages.rollout,
    settings,
    session.mesh.shape,
    remat=config.model.remat != "none",
    freeze_und=config.optimizer.freeze_und,
  )
  # The last slot of a text is not sampled: it holds the end.
  num_thought = rows * (capacities.thought - 1)
  num_answer = rows * (capacities.answer - 1)
  whole = Workload(_sum(costs), num_thought + num_answer, 2 * rows)
  return {
    **dict.fromkeys(ITERATIONS, whole),
    "think": Workload(costs["think"], tokens=num_thought),
    "draft_flow": Workload(costs["draft_flow"], images=rows),
    "image_decode": Workload(costs["draft_decode"], images=rows),
    "reason_update": Workload(costs["reason_update"], images=rows),
    "look": Workload(costs["look"], images=groups),
    "reflect": Workload(costs["reflect"], tokens=num_answer),
    "refine_context": Workload(costs["refine_context"], images=groups),
    "refine_flow": Workload(costs["refine_flow"], images=rows),
    "edit_update": Workload(costs["edit_update"], images=rows),
  }


def _sum(costs: Mapping[str, count.Cost]) -> count.Cost:
  total = count.Cost(0, 0)
  for cost in costs.values():
    total += cost
  return total

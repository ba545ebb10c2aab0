"""How an agent samples: frozen values that rollout and scoring are compiled with."""

import dataclasses

import numpy as np

from r3jax.sampling import classifier_free
from r3jax.sampling import decoding
from r3jax.sampling import schedules
from r3jax.sequence import layouts


@dataclasses.dataclass(frozen=True)
class FlowSettings:
  """How the images of one stage are sampled (docs/algorithm.md#sampling-images).

  Attributes:
    schedule: times of the trajectory.
    guidance: scales, renorm and interval of classifier-free guidance.
    eta: noise scale η(t) of the SDE step.
    sde_index_max: the number of the SDE step is uniform over 0 .. sde_index_max
      - 1; with 0 every step is an ODE step.
  """

  schedule: schedules.Schedule
  guidance: classifier_free.Guidance
  eta: schedules.Eta
  sde_index_max: int

  def __post_init__(self):
    if not 0 <= self.sde_index_max <= self.schedule.num_steps:
      raise ValueError(
        f"sde_index_max must be in 0..{self.schedule.num_steps} (the steps of the schedule);"
        f" got {self.sde_index_max}"
      )

  @property
  def guided(self) -> np.ndarray:
    """Whether each step is guided, bool [num_steps]."""
    starts = self.schedule.times()[:-1]
    return np.asarray(self.guidance.active(starts))

  def branches(self, names: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the noise segments that the guidance needs.

    Args:
      names: the stage's noise segments: full context, without text[, without
        image].

    Returns:
      The first one, two or three of `names`.
    """
    num_branches = 1 + self.guidance.uses_text + self.guidance.uses_image
    return names[:num_branches]


@dataclasses.dataclass(frozen=True)
class RolloutSettings:
  """How the three stages are sampled and scored.

  Attributes:
    capacities: slots of every segment.
    reason_text, reflect_text: how thoughts and reflections are sampled.
    reason_flow, refine_flow: how drafts and edits are sampled.
    system_reason, system_reflect: token ids of the system prompts, begin and
      end included.
    reference_loss: score as the reference's trainer does, see
      `agent/reference_loss.py`.
  """

  capacities: layouts.Capacities
  reason_text: decoding.TextSampling
  reflect_text: decoding.TextSampling
  reason_flow: FlowSettings
  refine_flow: FlowSettings
  system_reason: tuple[int, ...]
  system_reflect: tuple[int, ...]
  reference_loss: bool = False

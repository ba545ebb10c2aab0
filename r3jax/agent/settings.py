"""What an R3 run computes: frozen values that the compiled step closes over."""

from collections.abc import Callable
import dataclasses

import numpy as np

from r3jax.model import image_encoders
from r3jax.model import network
from r3jax.parallel import sharding
from r3jax.sampling import classifier_free
from r3jax.sampling import decoding
from r3jax.sampling import schedules
from r3jax.sequence import layouts


@dataclasses.dataclass(frozen=True)
class FlowSettings:
  """Sampling of one stage's images.

  Attributes:
    schedule: times.
    guidance: scales, renorm and interval.
    eta: noise scale of the SDE step.
    sde_index_max: the SDE step is uniform over 0 .. sde_index_max - 1; 0 samples by ODE only.
    on_step: called on the host with the number of every step, see `flow.sample`.
  """

  schedule: schedules.Schedule
  guidance: classifier_free.Guidance
  eta: schedules.Eta
  sde_index_max: int
  on_step: Callable[[np.ndarray], None] | None = None

  def __post_init__(self):
    if not 0 <= self.sde_index_max <= self.schedule.num_steps:
      raise ValueError(
        f"sde_index_max must be in 0..{self.schedule.num_steps} (the steps of the schedule);"
        f" got {self.sde_index_max}"
      )

  @property
  def guided(self) -> np.ndarray:
    """Which steps are guided, [steps] bool."""
    return np.array(
      [self.guidance.active(t) for t in self.schedule.times()[:-1]], bool
    )

  def branches(
    self, names: tuple[str, str, str] | tuple[str, str]
  ) -> tuple[str, ...]:
    """Returns the noise segments needed: full context[, without text[, without image]]."""
    needed = 1 + self.guidance.uses_text + self.guidance.uses_image
    return names[:needed]


@dataclasses.dataclass(frozen=True)
class LossSettings:
  """Weights of the objective (R3.md section 8).

  Attributes:
    text_weight, image_weight: of the two policy losses.
    text_kl, image_kl: of the KL to the reference; the text KL is inside the text weight.
    clip_range: ratios are clipped to [1 - c, 1 + c].
    divide_by_std: divide advantages by the group's standard deviation.
    format_weight: w_f in the text return f r + w_f f.
  """

  text_weight: float
  image_weight: float
  text_kl: float
  image_kl: float
  clip_range: float
  divide_by_std: bool
  format_weight: float

  @property
  def needs_reference(self) -> bool:
    """Whether either KL is computed."""
    return self.text_kl > 0 or self.image_kl > 0


@dataclasses.dataclass(frozen=True)
class Settings:
  """One R3 iteration.

  Attributes:
    groups: prompts per iteration, over all replicas.
    group_size: samples per prompt.
    capacities: slots of every segment.
    reason_text, reflect_text: how thoughts and reflections are drawn.
    reason_flow, refine_flow: how drafts and edits are drawn.
    loss: weights of the objective.
    pool_perfect: probability that a group reflects on a perfect image.
    system_reason, system_reflect: ids of the system prompts, begin and end included.
    reflect_rounds: updates on reflect-refine per iteration; 0 trains the reason stage only.
    reference_loss: compute the reference's literal loss, see `rl/compat.py`.
    micro_batches: parts of a replica's samples whose gradients are computed one after the other.
  """

  groups: int
  group_size: int
  capacities: layouts.Capacities
  reason_text: decoding.TextSampling
  reflect_text: decoding.TextSampling
  reason_flow: FlowSettings
  refine_flow: FlowSettings
  loss: LossSettings
  pool_perfect: float
  system_reason: tuple[int, ...]
  system_reflect: tuple[int, ...]
  reflect_rounds: int = 1
  reference_loss: bool = False
  micro_batches: int = 1

  def __post_init__(self):
    if self.micro_batches < 1:
      raise ValueError(
        f"step.micro_batches must be at least 1; got {self.micro_batches}"
      )
    if self.groups < 1:
      raise ValueError(f"groups_per_step must be at least 1; got {self.groups}")
    if self.reflect_rounds < 0:
      raise ValueError(
        f"reflect_rounds must be at least 0; got {self.reflect_rounds}"
      )
    if self.group_size < 2:
      raise ValueError(
        f"group_size must be at least 2 to compare samples; got {self.group_size}"
      )
    if not 0 <= self.pool_perfect <= 1:
      raise ValueError(
        f"pool_perfect must be a probability; got {self.pool_perfect}"
      )


@dataclasses.dataclass(frozen=True)
class Modules:
  """The model.

  Attributes:
    bagel: its trained half, with the rules of training.
    towers: its frozen half.
    rollout_rules: where parameters and activations of rollouts go.
  """

  bagel: network.Bagel
  towers: image_encoders.Towers
  rollout_rules: sharding.Rules = sharding.TRAIN

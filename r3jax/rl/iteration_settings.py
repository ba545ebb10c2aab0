"""How an R3 iteration learns: frozen values that its stages are compiled with."""

import dataclasses

CHAINS = ("tree", "full")
POOL_SOURCES = ("drafts", "edits")


@dataclasses.dataclass(frozen=True)
class LossSettings:
  """Weights of the objective (docs/algorithm.md#objective).

  Attributes:
    text_weight, image_weight: weights of the text loss and of the image policy
      loss.
    text_kl, image_kl: weights of the KL to the reference; `text_weight`
      multiplies the text KL too.
    clip_range: c of texts; ratios of tokens are clipped to [1 - c, 1 + c].
    image_clip_range: c of images.
    divide_by_std: whether advantages are divided by the group's standard
      deviation.
    format_weight: w_f in the text return f r + w_f f.
  """

  text_weight: float
  image_weight: float
  text_kl: float
  image_kl: float
  clip_range: float
  image_clip_range: float
  divide_by_std: bool
  format_weight: float

  @property
  def needs_reference(self) -> bool:
    """Whether the objective has a KL term."""
    return self.text_kl > 0 or self.image_kl > 0


@dataclasses.dataclass(frozen=True)
class IterationSettings:
  """What one R3 iteration learns from, and how; `rollout_settings` says how it samples.

  Attributes:
    num_groups: prompts per iteration, over all replicas (G).
    group_size: samples per prompt (M), at least 2.
    loss: weights of the objective.
    pool_perfect: probability that a group reflects on an image of score 1.
    chain: one of CHAINS. "tree": groups reflect on images of a pool, with an
      update after every stage; "full": samples reflect on their own images,
      with one update on all stages.
    pool_source: one of POOL_SOURCES, the images that the pool of a further
      round holds.
    num_reflect_rounds: rounds of reflect and refine per iteration; 0 trains
      the reason stage only.
    num_micro_batches: parts that a replica's samples are cut into; their
      gradients are computed one after the other.
  """

  num_groups: int
  group_size: int
  loss: LossSettings
  pool_perfect: float
  chain: str
  pool_source: str
  num_reflect_rounds: int = 1
  num_micro_batches: int = 1

  def __post_init__(self):
    if self.num_micro_batches < 1:
      raise ValueError(
        f"step.micro_batches must be at least 1; got {self.num_micro_batches}"
      )
    if self.chain not in CHAINS:
      raise ValueError(
        f"step.chain must be one of {CHAINS}; got {self.chain!r}"
      )
    if self.pool_source not in POOL_SOURCES:
      raise ValueError(
        f"pool.source must be one of {POOL_SOURCES}; got {self.pool_source!r}"
      )
    if self.num_groups < 1:
      raise ValueError(
        f"groups_per_step must be at least 1; got {self.num_groups}"
      )
    if self.num_reflect_rounds < 0:
      raise ValueError(
        f"reflect_rounds must be at least 0; got {self.num_reflect_rounds}"
      )
    if self.group_size < 2:
      raise ValueError(
        f"group_size must be at least 2 to compare samples; got {self.group_size}"
      )
    if not 0 <= self.pool_perfect <= 1:
      raise ValueError(
        f"pool_perfect must be a probability; got {self.pool_perfect}"
      )

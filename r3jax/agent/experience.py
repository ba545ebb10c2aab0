"""What rollouts record: the pytrees that sampling returns and the losses read."""

import flax.struct
import jax

from r3jax import types
from r3jax.sampling import flow_matching


@flax.struct.dataclass
class Prompts:
  """What the groups are asked for; one row per group."""

  ids: jax.Array  # [G, P] prompt segments
  length: jax.Array  # [G]
  question: jax.Array  # [G, Q] reflection questions
  question_length: jax.Array  # [G]
  target: object  # pytree of [G, ...]: what the reward compares with
  index: jax.Array  # [G] int32 number of the prompt in its data set


@flax.struct.dataclass
class Text:
  """A sampled text segment as the loss needs it."""

  ids: jax.Array  # [B, T]
  lengths: jax.Array  # [B]
  behavior_logprob: jax.Array  # [B, T - 1]


@flax.struct.dataclass
class Reason:
  """A rollout of the reason stage."""

  text: Text
  flow: flow_matching.Trajectory
  images: types.Images  # [B, h, w, 3]


@flax.struct.dataclass
class Source:
  """The images that groups reflect on; one row per group."""

  images: types.GroupImages  # [G, h, w, 3]
  features: jax.Array  # [G, N, vision hidden]
  latent: types.GroupLatent  # [G, N, C]


@flax.struct.dataclass
class Instruction:
  """What the refine stage is told; one row per sample."""

  ids: jax.Array  # [B, I]
  lengths: jax.Array  # [B]
  stop: jax.Array  # [B] "no further edit": the image stays


@flax.struct.dataclass
class Refine:
  """A rollout of the refine stage."""

  flow: flow_matching.Trajectory
  images: types.Images  # [B, h, w, 3] the source where nothing was edited

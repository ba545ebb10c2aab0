"""What rollouts read and record: the pytrees that sampling returns and scoring reads.

Arrays with a row per group are [G, ...]; those with a row per sample are [B, ...], group by group.
"""

import flax.struct
import jax

from r3jax import types
from r3jax.sampling import flow_matching


@flax.struct.dataclass
class Prompts:
  """The prompts of some groups.

  Attributes:
    ids: prompt segments, begin and end included.
    length: their lengths.
    question: reflection questions with the prompt in them, begin and end
      included.
    question_length: their lengths.
    target: pytree of what the reward compares images with.
    index: number of the prompt in its data set.
  """

  ids: jax.Array  # [G, P] int32
  length: jax.Array  # [G] int32
  question: jax.Array  # [G, Q] int32
  question_length: jax.Array  # [G] int32
  target: object  # [G, ...]
  index: jax.Array  # [G] int32


@flax.struct.dataclass
class Text:
  """A sampled text segment.

  Attributes:
    ids: begin, sampled tokens, end, padding.
    lengths: slots in use, begin and end included.
    behavior_logprob: log-probs when the text was sampled; entry j belongs to
      ids[:, j + 1].
  """

  ids: jax.Array  # [B, T] int32
  lengths: jax.Array  # [B] int32
  behavior_logprob: jax.Array  # [B, T - 1]


@flax.struct.dataclass
class Reason:
  """A rollout of the reason stage: thoughts and drafts.

  Attributes:
    text: the thoughts.
    trajectory: the latents of the drafts, with the SDE step.
    images: the drafts, 8-bit RGB.
    is_finite: whether latents and pixels are; others show nothing.
  """

  text: Text
  trajectory: flow_matching.Trajectory
  images: types.Images  # [B, h, w, 3]
  is_finite: types.Flags  # [B]


@flax.struct.dataclass
class Source:
  """The images that groups reflect on and edit.

  Attributes:
    images: 8-bit RGB.
    features: ViT features.
    latent: clean latents.
  """

  images: types.GroupImages  # [G, h, w, 3]
  features: jax.Array  # [G, N, vision hidden]
  latent: types.GroupLatent  # [G, N, C]


@flax.struct.dataclass
class Instruction:
  """The instructions that the refine stage follows.

  Attributes:
    ids: text segments, begin and end included.
    lengths: slots in use.
    stop: whether the instruction is "no further edit", so that the image stays.
  """

  ids: jax.Array  # [B, I] int32
  lengths: jax.Array  # [B] int32
  stop: jax.Array  # [B] bool


@flax.struct.dataclass
class Refine:
  """A rollout of the refine stage.

  Attributes:
    trajectory: the latents of the edits, with the SDE step.
    images: the edits, 8-bit RGB; the source image where the instruction is to
      stop.
    is_finite: whether latents and pixels are; others show nothing. True where
      the instruction is to stop.
  """

  trajectory: flow_matching.Trajectory
  images: types.Images  # [B, h, w, 3]
  is_finite: types.Flags  # [B]


@flax.struct.dataclass
class Recorded:
  """What scoring reads of a reason rollout.

  Attributes:
    text: the thoughts.
    trajectory: the latents of the drafts.
  """

  text: Text
  trajectory: flow_matching.Trajectory


@flax.struct.dataclass
class RecordedEdit(Recorded):
  """What scoring reads of a rollout of reflect and refine: the reflections and the edits.

  Attributes:
    instruction: instructions that the edits followed.
  """

  instruction: Instruction

"""What the stages of an iteration hand on to each other and to reports."""

import flax.struct
import jax

from r3jax import types
from r3jax.agent import experience
from r3jax.rl import pools


@flax.struct.dataclass
class Drafts:
  """The reason stage of one replica.

  Attributes:
    rollout: thoughts and drafts, rows of samples.
    prompts: of this replica's groups, rows of groups.
    format_reward: f of every thought.
    prompt_index: which of the iteration's prompts every sample works on.
  """

  rollout: experience.Reason
  prompts: experience.Prompts
  format_reward: jax.Array  # [B] float32
  prompt_index: jax.Array  # [B] int32


@flax.struct.dataclass
class Edits:
  """The reflect and refine stages of one replica.

  Attributes:
    text: reflections, rows of samples.
    format_reward: f of every reflection.
    instruction: what the reflections ask for.
    truncated: whether the instruction did not fit into its segment.
    refined: edited images, rows of samples.
    prompts: what the source images were made for, a row per source image.
    source: images that are reflected on: rows of groups in the tree, rows of
      samples in the full chain.
    reward_before: r₀ of every sample's source image; read it only where
      `valid_before`.
    valid_before: whether that reward is there.
    parts_before: its parts by name.
    prompt_index: which of the iteration's prompts every sample works on.
  """

  text: experience.Text
  format_reward: jax.Array  # [B] float32
  instruction: experience.Instruction
  truncated: jax.Array  # [B] bool
  refined: experience.Refine
  prompts: experience.Prompts
  source: experience.Source
  reward_before: jax.Array  # [B] float32
  valid_before: jax.Array  # [B] bool
  parts_before: dict[str, jax.Array]  # [B] float32 each
  prompt_index: jax.Array  # [B] int32


@flax.struct.dataclass
class Samples:
  """All samples of an iteration, for reports; one row per sample or per group.

  The edits are those of the last round, and None where the iteration has no such round.
  """

  drafts: Drafts
  draft_score: types.Score
  edits: Edits | None
  edit_score: types.Score | None


def scored_drafts(drafts: Drafts, score: types.Score) -> pools.ScoredImages:
  """Returns the drafts with their scores, rows of samples."""
  return pools.ScoredImages(
    images=drafts.rollout.images,
    reward=score.value,
    valid=score.valid,
    parts=score.parts,
    prompt_index=drafts.prompt_index,
  )


def scored_edits(edits: Edits, score: types.Score) -> pools.ScoredImages:
  """Returns the edits with their scores, rows of samples; one needs the score of its source too."""
  return pools.ScoredImages(
    images=edits.refined.images,
    reward=score.value,
    valid=score.valid & edits.valid_before,
    parts=score.parts,
    prompt_index=edits.prompt_index,
  )

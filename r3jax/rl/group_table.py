"""What one stage earned and wrote, as a table [G, M]: a row per group, a column per sample.

Every replica gathers the same table once per stage. Returns, advantages and diagnostics are
functions of it that need no mesh.
"""

import flax.struct
import jax
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

Values = Float[Array, "G M"]
Flags = Bool[Array, "G M"]
Counts = Int[Array, "G M"]


@flax.struct.dataclass
class GroupTable:
  """The columns that both stages have.

  Attributes:
    reward: r in [0, 1], the task reward of the image; read it only where
      `valid`.
    valid: whether every reward that the sample's return needs is there.
    parts: parts of the reward for the log, not finite where a part is missing.
    format_reward: f, 1 where the text has the right format and 0 elsewhere.
    num_tokens: length of the text, begin and end included.
    at_limit: whether the limit ended the text.
    is_finite: whether the sample's latents and pixels are; the reward of
      another is missing.
  """

  reward: jax.Array  # [G, M] float32
  valid: jax.Array  # [G, M] bool
  parts: dict[str, jax.Array]  # [G, M] float32 each
  format_reward: jax.Array  # [G, M] float32
  num_tokens: jax.Array  # [G, M] int32
  at_limit: jax.Array  # [G, M] bool
  is_finite: jax.Array  # [G, M] bool


@flax.struct.dataclass
class ReasonTable(GroupTable):
  """The reason stage.

  Attributes:
    sde_time: t of the SDE step of the draft; 0 where the stage samples by ODE
      only.
  """

  sde_time: jax.Array  # [G, M]


@flax.struct.dataclass
class EditTable(GroupTable):
  """The reflect and refine stages.

  Attributes:
    reward_before: r₀, the reward of the source image; read it only where
      `valid`.
    stop: whether the instruction says "no further edit", so that the image
      stays.
    truncated: whether the instruction did not fit into its segment.
    prompt_index: which of the iteration's G prompts the group works on.
  """

  reward_before: jax.Array  # [G, M] float32
  stop: jax.Array  # [G, M] bool
  truncated: jax.Array  # [G, M] bool
  prompt_index: jax.Array  # [G, M] int32

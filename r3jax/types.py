"""Array types and the letters that name their dimensions, in signatures and in comments.

| letter | dimension |
| --- | --- |
| B | rows of a batch, one per sample: B = G * M, a group's are consecutive |
| G | rows that are one per group: row g is shared by the M samples of group g |
| M | samples of a group |
| T, S | query slots, key slots |
| P, Q, I | slots of a prompt, of a reflection question, of an edit instruction |
| N | latent tokens or ViT patches of an image |
| C | channels of a latent token |
| p | numbers of a patch |
| D | hidden width |
| F | features of a flow time |
| H, K | query heads, key/value heads |
| d | width of a head |
| V | vocabulary |
| L | layers |
| h, w, c | rows, columns and channels of an image or of a feature map |
"""

import dataclasses
from typing import Protocol

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int
from jaxtyping import UInt8

Params = dict  # nested dict of arrays
Key = jax.Array  # a typed PRNG key, or an array of them
DType = jax.typing.DTypeLike

# Text.
TokenIds = Int[Array, "B T"]
TokenFlags = Bool[Array, "B T"]
Lengths = Int[Array, "B"]
Positions = Int[Array, "B T"]  # rotary
Logits = Float[Array, "B T V"]

# Attention. Queries have a row per sample; keys and values may have a row per group.
Hidden = Float[Array, "B T D"]
Heads = Float[Array, "B T H d"]
KeyValue = Float[Array, "G S K d"]
Mask = Bool[Array, "B T S"]
Filled = Bool[Array, "B S"]

# Images and the flow.
Images = UInt8[Array, "B h w 3"]
GroupImages = UInt8[Array, "G h w 3"]
Pixels = Float[Array, "B h w 3"]  # in [-1, 1]
Patches = Float[Array, "B N p"]
Latent = Float[Array, "B N C"]
GroupLatent = Float[Array, "G N C"]
Time = Float[Array, "B"]  # in [0, 1], 1 is noise
StepStd = Float[Array, "B 1 1"]  # of an SDE step

# A number or a truth value per sample.
PerSample = Float[Array, "B"]
Flags = Bool[Array, "B"]


@flax.struct.dataclass
class Score:
  """The rewards of B images (or texts); a failed reward is missing, never zero.

  Attributes:
    value: reward that training maximizes, in [0, 1]; meaningless where `valid` is False.
    valid: False where the reward could not be computed.
    parts: components of the reward for the log, by name.
  """

  value: jax.Array  # [B] float32
  valid: jax.Array  # [B] bool
  parts: dict[str, jax.Array]  # [B] float32 each

  def only_where(self, flags: jax.Array) -> "Score":
    """Returns the same scores, missing where a flag is False or the value is not finite.

    Args:
      flags: bool [B], images that can have a score.
    """
    valid = self.valid & flags & jnp.isfinite(self.value)
    return dataclasses.replace(self, valid=valid)


class Scoring(Protocol):
  """A reward inside the compiled step."""

  def __call__(
    self, images: Images, target, needed: Flags | None = None, /
  ) -> Score:
    """Scores images by what their prompts ask for.

    Args:
      images: uint8 [B, h, w, 3].
      target: what the prompt of every row asks for, leaves [B, ...].
      needed: rows whose score is read, all by default. The others may get no
        score: a service is not asked about them.
    """
    ...

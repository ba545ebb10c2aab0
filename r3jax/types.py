"""Array aliases; the letters name dimensions everywhere in r3jax.

| letter | dimension |
| --- | --- |
| B | rows of a batch (samples; in prefixes: groups) |
| G, M | groups, samples of a group (B = G * M, group-major) |
| T, S | query slots, key slots |
| N | latent tokens or patches of one image |
| C | numbers in a latent token |
| D | hidden width |
| H, K | query heads, key/value heads |
| V | vocabulary |
| L | layers |
"""

from collections.abc import Callable

import flax.struct
import jax
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int
from jaxtyping import UInt8

Params = dict  # nested dict of arrays
Key = jax.Array  # typed PRNG key, or an array of them
DType = jax.typing.DTypeLike

Latent = Float[Array, "B N C"]
Hidden = Float[Array, "B T D"]
Heads = Float[Array, "B T H d"]
# b divides B: a row is shared by B / b consecutive queries
KeyValue = Float[Array, "b S K d"]
Mask = Bool[Array, "B T S"]
Filled = Bool[Array, "B S"]
Positions = Int[Array, "B T"]
TokenIds = Int[Array, "B T"]
Lengths = Int[Array, "B"]
Time = Float[Array, "B"]
StepStd = Float[Array, "B 1 1"]  # of an SDE step, one per sample
PerSample = Float[Array, "B"]
Flags = Bool[Array, "B"]
Logits = Float[Array, "B T V"]
Images = UInt8[Array, "B h w 3"]
Pixels = Float[Array, "B h w 3"]


@flax.struct.dataclass
class Score:
  """Holds what images (or texts) earned. A failed reward is missing, never zero."""

  # float32 [B] in [0, 1], what training uses; read it only where `valid`.
  value: jax.Array
  valid: jax.Array  # bool [B], False where the reward could not be had.
  parts: dict[str, jax.Array]  # float32 [B] each, for the log.


# In the graph: images [B, ...] and target rows [B, ...] to their scores.
Scoring = Callable[[Images, object], Score]

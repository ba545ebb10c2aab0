"""What every reward returns."""

import flax.struct
import jax


@flax.struct.dataclass
class Score:
  """Holds what images (or texts) earned. A failed reward is missing, never zero."""

  value: jax.Array  # float32 [B] in [0, 1], what training uses; read it only where `valid`.
  valid: jax.Array  # bool [B], False where the reward could not be had.
  parts: dict[str, jax.Array]  # float32 [B] each, for the log.

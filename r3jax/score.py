"""What a reward returns inside the graph: a score where there is one, and never a number where there is none."""

from collections.abc import Callable

import flax.struct
import jax

from r3jax import types


@flax.struct.dataclass
class Score:
  """Holds what images (or texts) earned. A failed reward is missing, never zero."""

  value: jax.Array  # float32 [B] in [0, 1], what training uses; read it only where `valid`.
  valid: jax.Array  # bool [B], False where the reward could not be had.
  parts: dict[str, jax.Array]  # float32 [B] each, for the log.


LOWER_IS_BETTER = ("clutter",)  # parts of scores; of all others, and of scores, more is better
Scoring = Callable[[types.Images, object], Score]  # in the graph: images [B, ...], target rows [B, ...]

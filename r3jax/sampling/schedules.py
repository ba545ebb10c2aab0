"""Times of the flow and size of its noise (docs/algorithm.md#sampling-images)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Schedule:
  """Times of a trajectory from noise (t = 1) to data (t = 0).

  Attributes:
    points: number of times; a trajectory has points - 1 steps.
    shift: s in t' = s t / (1 + (s - 1) t); above 1 it moves times toward noise.
  """

  points: int
  shift: float = 3.0

  def __post_init__(self):
    if self.points < 2:
      raise ValueError(f"a schedule needs at least 2 points; got {self.points}")

  @property
  def num_steps(self) -> int:
    """Steps of the trajectory."""
    return self.points - 1

  def times(self) -> np.ndarray:
    """Returns the shifted times, [points] float64, from 1 down to 0."""
    t = np.linspace(1.0, 0.0, self.points)
    return self.shift * t / (1 + (self.shift - 1) * t)


@dataclasses.dataclass(frozen=True)
class Eta:
  """Noise scale of the SDE.

  Attributes:
    mode: "constant" (η = c) or "monotonic" (η = c √(t / (1 - min(t, 0.95)))).
    scale: c.
  """

  mode: str
  scale: float

  def __post_init__(self):
    if self.mode not in ("constant", "monotonic"):
      raise ValueError(
        f"eta mode must be 'constant' or 'monotonic'; got {self.mode!r}"
      )

  def __call__(self, t: jax.Array) -> jax.Array:
    """Returns η(t), in the shape of t."""
    if self.mode == "constant":
      return jnp.full_like(t, self.scale)
    return self.scale * jnp.sqrt(t / (1 - jnp.minimum(t, 0.95)))

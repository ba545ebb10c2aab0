"""The cost of a computation, and the roofline's time for it."""

import dataclasses

import jax.numpy as jnp

from r3jax import types
from r3jax.costs import chips


@dataclasses.dataclass(frozen=True)
class Cost:
  """The cost of a computation on all chips together.

  Attributes:
    flops: operations.
    read: bytes read from memory.
  """

  flops: float
  read: float

  def __add__(self, other: "Cost") -> "Cost":
    return Cost(self.flops + other.flops, self.read + other.read)

  def times(self, factor: float) -> "Cost":
    """Returns the cost of repeating it."""
    return Cost(self.flops * factor, self.read * factor)

  def seconds(self, chip: chips.Chip, num_chips: int) -> float:
    """Returns the roofline's time on a number of chips."""
    computing = self.flops / chip.flops
    reading = self.read / chip.bandwidth
    return max(computing, reading) / num_chips


def bytes_of(dtype: types.DType) -> int:
  """Returns the bytes of a number."""
  return jnp.dtype(dtype).itemsize

"""What a case computed, to be compared with what is recorded."""

from collections.abc import Callable, Iterator
import dataclasses

import numpy as np

from r3jax.parity import goldens


@dataclasses.dataclass(frozen=True)
class Seen:
  """One computed array.

  Attributes:
    name: of the recorded array, or of the rule that it checks.
    value: computed here.
    expected: recorded; None takes it from the case's arrays.
    tolerance: as the manifest writes them; None takes it from there.
  """

  name: str
  value: object
  expected: np.ndarray | None = None
  tolerance: float | str | None = None


# folder, name of the case
Case = Callable[[goldens.Golden, str], Iterator[Seen]]

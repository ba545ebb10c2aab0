"""A computed array, to be compared with the recorded one."""

from collections.abc import Callable, Iterator
import dataclasses
from typing import Any

import numpy as np

from r3jax.parity import goldens


@dataclasses.dataclass(frozen=True)
class Result:
  """One computed array.

  Attributes:
    name: of the recorded array, or of the rule that it checks.
    value: the array.
    expected: the recorded array; None takes it from the case's arrays.
    tolerance: as the manifest writes them; None takes it from there.
  """

  name: str
  value: Any
  expected: np.ndarray | None = None
  tolerance: float | str | None = None


# Computes a case: (folder of goldens, name of the case) -> its arrays.
Case = Callable[[goldens.Golden, str], Iterator[Result]]

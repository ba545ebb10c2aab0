"""Tests of the figures of TPU devices."""

import pytest

from r3jax.costs import chips


class TestChips:
  @pytest.mark.parametrize("name", ["v7:2x2", "v5p", ""])
  def test_unknown_topology_lists_the_known(self, name):
    with pytest.raises(
      ValueError, match="must be CHIP:SHAPE.*v5p:4x4x4.*tpu7x:2x2x1"
    ):
      chips.of_topology(name)

"""Tests of the rates of an iteration."""

import pytest

from r3jax.costs import chips
from r3jax.run.logging import speed
from tests import documented

METRICS = {"seconds/step": 4.0, "reason/tokens": 11.0, "edit/tokens": 21.0}


class TestSpeed:
  def test_images_and_tokens_of_all_stages_count(self):
    rates = speed.Speed(8, ("reason", "edit"), None).compute(METRICS)
    assert rates == {
      "perf/images_per_second": 8 * 2 / 4,
      "perf/tokens_per_second": 8 * (10 + 20) / 4,
    }

  def test_share_of_the_peak_where_it_is_known(self):
    rates = speed.Speed(8, ("reason",), 1.0).compute(METRICS)
    assert rates["perf/mfu"] == 0.25
    documented.check({"perf/mfu"}, "chip")


class TestPeak:
  @pytest.mark.parametrize(
    "kind, flops",
    [
      ("TPU v5 lite", 197e12),
      ("TPU v5p", 459e12),
      ("NVIDIA H200", 989e12),
      ("NVIDIA H100 PCIe", 756e12),
      ("cpu", None),
    ],
  )
  def test_is_that_of_the_data_sheet(self, kind, flops):
    assert chips.peak_flops(kind) == flops

"""Tests of the sizes of a sweep, and of the lines through its points."""

import math

import pytest

from configs import benchmark
from r3jax.benchmark import config_rules
from r3jax.benchmark import sweep


def points(seconds_of, flops) -> list[sweep.Point]:
  return [
    sweep.Point("samples of a group", 4, "think", x, seconds_of(x))
    for x in flops
  ]


class TestVariations:
  def test_one_thing_varies_at_a_time_and_all_configs_hold(self):
    config = benchmark.get_config()
    variations = list(sweep.variations(config))
    assert len(variations) == 12
    for axis, value, varied in variations:
      config_rules.check(varied)
      assert varied.group_size == (value if "group" in axis else 4)
      assert varied.image.width == (value if "pixels" in axis else 256)


class TestFit:
  def test_finds_the_line_of_exact_points(self):
    line = sweep.fit(points(lambda x: 2 + 0.5 * x, (1.0, 2.0, 5.0)))
    assert (line.start, line.slope) == pytest.approx((2, 0.5))
    assert line.r_squared == pytest.approx(1)

  def test_explains_little_of_what_does_not_follow_operations(self):
    line = sweep.fit(points(lambda x: (x - 3) ** 2, (1.0, 3.0, 5.0)))
    assert line.r_squared == pytest.approx(0, abs=1e-9)

  def test_two_numbers_of_operations_explain_nothing(self):
    assert math.isnan(sweep.fit(points(float, (1.0, 1.0, 2.0))).r_squared)


class TestTable:
  def test_has_a_row_per_part_and_the_plot_its_lines(self):
    measured = points(lambda x: 1 + x / 1e9, (1e9, 2e9, 4e9))
    *_, row = sweep.table(measured).splitlines()
    assert row == "| think | 3 | 1.000 | 1.0 | 1.000 |"
    (axes,) = sweep.plot(measured).axes
    assert [line.get_label() for line in axes.get_lines()] == ["think"]
